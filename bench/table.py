"""Markdown tables of benchmark reports, a section a device: python bench/table.py
REPORT_OR_FOLDER... [--out RESULTS.md]

A report is a file of pytest-benchmark (.json) or of bench/gpu_check.sh (.jsonl); of a folder all
are read.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from cells import differences, grouped, head, over, row, share
from plan_tables import paper_table, plan_table
from report import Device, Entry, Info, read

KERNEL_COLUMNS = ("eager", "compiled", "triton", "cuda", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = page(read(arguments.reports))
    if arguments.out:
        written = arguments.out.with_name(f"{arguments.out.name}.part")
        written.write_text(text, encoding="utf-8")
        os.replace(written, arguments.out)
    print(text, end="")


def page(devices: Mapping[str, Device]) -> str:
    sections = [section(device) for device in devices.values()]
    return "\n\n".join(["# Results on GPUs", *(sections or ["Nothing was measured."])]) + "\n"


def section(device: Device) -> str:
    parts = [f"## {device.name}", *_circumstances(device)]
    if device.of("plan"):
        parts += ["### Plans", plan_table(device)]
        parts += ["### The paper's comparisons", paper_table(device)]
    if device.of("op"):
        parts += ["### Operations", kernel_table(device)]
    if device.growth:
        parts += ["### Growth", growth_table(device.growth)]
    if device.tests:
        parts += ["### Tests", _tests(device)]
    if gaps := _gaps(device):
        parts += ["### Not measured", gaps]
    return "\n\n".join(parts)


def _circumstances(device: Device) -> list[str]:
    """What the figures depend on, once where all runs agree."""
    lines: list[str] = []
    for facts in device.runs.values():
        line = ", ".join(
            f"{k} {v}" if k not in ("code", "date") else str(v)
            for k, v in facts.items()
            if k not in ("part", "device")
        )
        if line not in lines:
            lines.append(line)
    infos = [entry.info for entry in device.entries.values()]
    if infos and not lines:
        lines.append(", ".join(sorted({f"torch {info['torch']}" for info in infos})))
    if infos:
        dtypes = sorted({info["dtype"].removeprefix("torch.") for info in infos})
        lines.append(
            f"{', '.join(dtypes)}; ceilings measured in the same runs: {_ceilings(infos)}."
        )
    return ["  \n".join(lines)] if lines else []


def _ceilings(infos: Sequence[Info]) -> str:
    found: dict[str, list[float]] = defaultdict(list)
    for info in infos:
        for name, value in info["ceilings"].items():
            found[name].append(value / 1e12)
    texts = []
    for name, values in found.items():
        least, most = f"{min(values):.3g}", f"{max(values):.3g}"
        texts.append(
            f"{name} {least if least == most else f'{least} to {most}'} "
            f"{'TB/s' if name == 'copy' else 'TFLOP/s'}"
        )
    return ", ".join(texts)


ABOUT_KERNELS = """\
Microseconds a call, medians of graph replays over rotating inputs (on a CPU: of plain calls). Eager
and compiled: plain torch in the dtype of the arguments. Limit: the larger of bytes over the copy's
rate and operations over the product's. Ours: what `auto` takes, named in brackets.
"""


def kernel_table(device: Device) -> str:
    """Microseconds of every provider, the gain over eager and compiled torch, and the share of the
    limit that ours reaches.
    """
    entries = device.of("op")
    columns = [*KERNEL_COLUMNS, "ours over eager", "over compiled", "limit", "of the limit"]
    lines = [ABOUT_KERNELS, *head("operation", columns)]
    for group, found in grouped(entries).items():
        ours, floor = found.get("auto"), next(iter(found.values())).info["floor"]
        cells = [_microseconds(device, group, found, who) for who in KERNEL_COLUMNS]
        cells += [over(found, who, "auto") for who in ("eager", "compiled")]
        taken = f" ({ours.info['backend']})" if ours else ""
        lines.append(row([group + taken, *cells, f"{1e6 * floor:.1f}", share(floor, ours)]))
    notes = differences(entries)
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _microseconds(device: Device, group: str, found: Mapping[str, Entry], who: str) -> str:
    if who in found:
        return f"{1e6 * found[who].median / found[who].info['calls']:.1f}"
    return "wrong" if device.is_wrong(group, who) else ""


def growth_table(curves: Mapping[str, Mapping[float, Info]]) -> str:
    lines = [
        "Milliseconds an image of ours, without decoding.",
        "",
        *head("as it grows", ["at", "plan", "batch", "tokens", "ms", "limit"]),
    ]
    for curve, points in curves.items():
        for at, p in sorted(points.items()):
            times = [f"{p[key]:.2f}" for key in ("ms_an_image", "limit_ms_an_image")]
            lines.append(
                row([curve, f"{at:g}", p["plan"], str(p["batch"]), str(p["tokens"]), *times])
            )
    return "\n".join(lines)


def _tests(device: Device) -> str:
    outcomes = list(device.tests.values())
    counts = ", ".join(
        f"{outcomes.count(o)} {o}"
        for o in ("passed", "failed", "skipped", "not reached")
        if o in outcomes
    )
    failures = [f"- `{name}`: {why}" for name, why in device.failures.items()]
    return "\n".join(
        [f"{counts}, of those that need a GPU.", *([""] if failures else []), *failures]
    )


def _gaps(device: Device) -> str:
    """What was to be measured and was not, by reason; and the stages of each part's last run that
    did not pass.
    """
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (group, who), why in device.missing.items():
        reasons[who, why].append(group)
    lines = [f"- {who}, {why}: {'; '.join(groups)}" for (who, why), groups in reasons.items()]
    for part in dict.fromkeys(str(facts.get("part")) for facts in device.runs.values()):
        stages = [
            s
            for s in device.stages.get(device.last_run(part) or "", {}).values()
            if s.ended != "passed"
        ]
        lines += [
            f"- the stage {s.name} of {part} {s.ended}, after {s.seconds:.0f} s of {s.limit:.0f}"
            for s in stages
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
