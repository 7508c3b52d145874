"""A Markdown table of bench/test_kernels.py's JSON: python bench/table.py kernels.json [RESULTS.md]"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

COLUMNS = ("eager", "compiled", "triton", "cuda", "auto")


def table(report: dict[str, Any]) -> str:
    """Microseconds of every provider, the gain over eager and compiled torch, and the share of the limit that ours reaches."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for entry in report["benchmarks"]:
        groups[entry["group"]][entry["extra_info"]["provider"]] = entry
    if not groups:
        return "Nothing was measured.\n"
    info = report["benchmarks"][0]["extra_info"]
    limits = ", ".join(f"{k} {v / 1e12:.3g} {'TB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in info["ceilings"].items())
    lines = [
        f"{info['device']}, {info['dtype']}, torch {info['torch']}; ceilings measured in the same run: {limits}.",
        "Microseconds a call, medians of graph replays over rotating inputs (on a CPU: of plain calls). Limit: the larger of bytes",
        "over the copy's rate and operations over the product's. Ours: what `auto` takes.",
        "",
        f"| operation | {' | '.join(COLUMNS)} | ours over eager | over compiled | limit | of the limit |",
        f"|---|{'--:|' * (len(COLUMNS) + 4)}",
    ]
    for group, entries in groups.items():
        times = {p: e["stats"]["median"] / e["extra_info"]["calls"] for p, e in entries.items()}
        floor, ours = next(iter(entries.values()))["extra_info"]["floor"], times.get("auto")
        cells = [f"{1e6 * times[p]:.1f}" if p in times else "" for p in COLUMNS]
        ratios = [f"{times[p] / ours:.2f}x" if ours and p in times else "" for p in ("eager", "compiled")]
        share = f"{100 * floor / ours:.0f} %" if ours else ""
        taken = f" ({entries['auto']['extra_info']['backend']})" if "auto" in entries else ""
        lines.append(f"| {group}{taken} | {' | '.join((*cells, *ratios))} | {1e6 * floor:.1f} | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = "# Results on GPUs\n\n" + table(json.loads(Path(sys.argv[1]).read_text()))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)
    print(text, end="")
