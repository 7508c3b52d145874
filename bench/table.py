"""Markdown tables of benchmark reports: python bench/table.py REPORT.json... [--out RESULTS.md]"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KERNEL_COLUMNS = ("eager", "compiled", "triton", "cuda", "auto")
RIVALS = ("autocast", "eager", "compile", "max-autotune", "plan-graph", "diffusers", "ours-eager", "ours", "ours-fp8")
PAPER_PAIRS = (("H2P4R2", "H8"), ("H5P7R3", "H15"), ("H8P9R5", "H24"))
"""FlowTurbo's plans and the Heun solutions that the paper sets beside them (its table of class-conditional results)."""

PAPER_WAYS = {
    "both compiled": ("compile", "compile"),
    "compiled, against eager Heun": ("compile", "autocast"),
    "ours, against eager Heun": ("ours", "autocast"),
    "ours, against compiled Heun": ("ours", "compile"),
    "both ours": ("ours", "ours"),
}
OVER = ("autocast", "compile", "max-autotune")
PAIR = "(ours, max-autotune)"
PLAN_COLUMNS = ("limit", "of the limit", "images/s", "decoding", f"first image, s {PAIR}", f"memory, GiB {PAIR}")

Entry = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    entries = [entry for path in arguments.reports for entry in json.loads(path.read_text())["benchmarks"]]
    text = page(entries)
    if arguments.out:
        arguments.out.write_text(text)
    print(text, end="")


def page(entries: Sequence[Entry]) -> str:
    if not entries:
        return "# Results on GPUs\n\nNothing was measured.\n"
    parts = [f"# Results on {entries[0]['extra_info']['device']}", _ceilings(entries[0]["extra_info"])]
    kernels, plans = ([e for e in entries if key in e["extra_info"]] for key in ("op", "plan"))
    if plans:
        parts += ["## Plans", plan_table(plans), "## The paper's comparisons", paper_table(plans)]
    if kernels:
        parts += ["## Operations", kernel_table(kernels)]
    return "\n\n".join(parts) + "\n"


def _ceilings(info: Mapping[str, Any]) -> str:
    limits = ", ".join(f"{k} {v / 1e12:.3g} {'TB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in info["ceilings"].items())
    dtype = info["dtype"].removeprefix("torch.")
    return f"{dtype}, torch {info['torch']}; ceilings measured in the same run: {limits}."


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(first: str, others: Sequence[str]) -> list[str]:
    return [_row((first, *others)), f"|---|{'--:|' * len(others)}"]


def _over(times: Mapping[str, float], rival: str, ours: str = "ours") -> str:
    return f"{times[rival] / times[ours]:.2f}x" if rival in times and ours in times else ""


def plan_table(entries: Sequence[Entry]) -> str:
    """Milliseconds an image of everyone, our gain, and the share of the device's limit that we reach."""
    groups: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        groups[entry["group"]][entry["extra_info"]["rival"]] = entry
    who = [r for r in RIVALS if any(r in group for group in groups.values())]
    lines = [
        "Milliseconds an image, medians; guidance on; random weights, the same for all but diffusers' transformer. Limit:",
        "every call's products, or its weights read once, and the decoder's products, at the measured ceilings. First image: with",
        "loading, compiling and capturing, which a rival's first plan pays. Memory: peak of what torch holds, weights included.",
        "",
        *_head("plan", [*who, *(f"ours over {rival}" for rival in OVER), *PLAN_COLUMNS]),
    ]
    for group, found in groups.items():
        info = next(iter(found.values()))["extra_info"]
        times = {rival: entry["stats"]["median"] / info["batch"] for rival, entry in found.items()}
        ours, floor = times.get("ours"), info["floor"] / info["batch"]
        pair = [found[r]["extra_info"] if r in found else None for r in ("ours", "max-autotune")]
        lines.append(
            _row(
                [group]
                + [f"{1e3 * times[r]:.2f}" if r in times else "" for r in who]
                + [_over(times, r) for r in OVER]
                + [f"{1e3 * floor:.2f}"]
                + ([f"{100 * floor / ours:.0f} %", f"{1 / ours:.1f}"] if ours else ["", ""])
                + [f"{100 * info['decode_seconds'] / info['batch'] / ours:.0f} %" if ours and info["decode"] else ""]
                + [", ".join("" if p is None else f"{p['first_seconds']:.1f}" for p in pair)]
                + [", ".join("" if p is None or p["peak_bytes"] is None else f"{p['peak_bytes'] / 2**30:.1f}" for p in pair)]
            )
        )
    return "\n".join(lines)


def paper_table(entries: Sequence[Entry]) -> str:
    """FlowTurbo against Heun as the paper compares them: both compiled, and compiled against eager; and both in this library."""
    times: dict[tuple[Any, ...], dict[tuple[str, str], float]] = defaultdict(dict)
    for entry in entries:
        info = entry["extra_info"]
        times[info["size"], info["batch"], info["decode"]][info["plan"], info["rival"]] = entry["stats"]["median"]
    lines = _head("FlowTurbo, Heun", list(PAPER_WAYS))
    for (size, batch, decode), found in times.items():
        for turbo, heun in PAPER_PAIRS:
            cells = []
            for mine, theirs in PAPER_WAYS.values():
                a, b = found.get((turbo, mine)), found.get((heun, theirs))
                cells.append(f"{b / a:.2f}x" if a and b else "")
            if any(cells):
                lines.append(_row([f"{turbo}, {heun}, {size}x{size} batch {batch}{' with decoding' if decode else ''}", *cells]))
    return "\n".join(lines) if len(lines) > 2 else "None of these pairs was measured."


def kernel_table(entries: Sequence[Entry]) -> str:
    """Microseconds of every provider, the gain over eager and compiled torch, and the share of the limit that ours reaches."""
    groups: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        groups[entry["group"]][entry["extra_info"]["provider"]] = entry
    lines = [
        "Microseconds a call, medians of graph replays over rotating inputs (on a CPU: of plain calls). Limit: the larger of bytes",
        "over the copy's rate and operations over the product's. Ours: what `auto` takes.",
        "",
        *_head("operation", [*KERNEL_COLUMNS, "ours over eager", "over compiled", "limit", "of the limit"]),
    ]
    for group, found in groups.items():
        times = {p: e["stats"]["median"] / e["extra_info"]["calls"] for p, e in found.items()}
        floor, ours = next(iter(found.values()))["extra_info"]["floor"], times.get("auto")
        cells = [f"{1e6 * times[p]:.1f}" if p in times else "" for p in KERNEL_COLUMNS]
        cells += [_over(times, p, "auto") for p in ("eager", "compiled")]
        taken = f" ({found['auto']['extra_info']['backend']})" if "auto" in found else ""
        lines.append(_row([group + taken, *cells, f"{1e6 * floor:.1f}", f"{100 * floor / ours:.0f} %" if ours else ""]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
