"""Markdown tables of benchmark reports, a section a device: python bench/table.py
REPORT_OR_FOLDER... [--out RESULTS.md]

A report is a file of pytest-benchmark (.json) or of bench/gpu_check.sh (.jsonl); of a folder all
are read.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from report import Device, Entry, Info, read
from summary import gain

KERNEL_COLUMNS = ("eager", "compiled", "triton", "cuda", "auto")
RIVALS = (
    *(
        "autocast",
        "eager",
        "compile",
        "max-autotune",
        "plan-graph",
        "plan-graph-hoisted",
        "diffusers",
        "ours-eager",
        "ours",
    ),
    *("max-autotune-fp8", "plan-graph-fp8", "ours-fp8"),
)
"""The columns' order; others follow."""

PAPER_PAIRS = (("H2P4R2", "H8"), ("H5P7R3", "H15"), ("H8P9R5", "H24"))
"""FlowTurbo's plans and the Heun solutions that the paper sets beside them (its table of
class-conditional results).
"""

PAPER_WAYS = {
    "both compiled": ("compile", "compile"),
    "compiled, against eager Heun": ("compile", "autocast"),
    "ours, against eager Heun": ("ours", "autocast"),
    "ours, against compiled Heun": ("ours", "compile"),
    "both ours": ("ours", "ours"),
}
OVER = ("autocast", "compile", "max-autotune", "plan-graph", "plan-graph-hoisted")
PAIR = "(ours, max-autotune)"
PLAN_COLUMNS = (
    "limit",
    "of the limit",
    "fp8: limit",
    "of it",
    "images/s",
    "decoding",
    f"first image, s {PAIR}",
    f"memory, GiB {PAIR}",
)


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
        written.write_text(text)
        os.replace(written, arguments.out)
    print(text, end="")


def page(devices: Mapping[str, Device]) -> str:
    sections = [section(device) for device in devices.values()]
    return "\n\n".join(["# Results on GPUs", *(sections or ["Nothing was measured."])]) + "\n"


def section(device: Device) -> str:
    parts = [f"## {device.name}", *_circumstances(device)]
    if plans := device.of("plan"):
        parts += ["### Plans", plan_table(plans), "### The paper's comparisons", paper_table(plans)]
    if kernels := device.of("op"):
        parts += ["### Operations", kernel_table(kernels)]
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


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(first: str, others: Sequence[str]) -> list[str]:
    return [_row((first, *others)), f"|---|{'--:|' * len(others)}"]


def _grouped(entries: Iterable[Entry]) -> dict[str, dict[str, Entry]]:
    groups: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        groups[entry.group][entry.who] = entry
    return groups


def _over(found: Mapping[str, Entry], rival: str, ours: str = "ours") -> str:
    """Against ours of the same run, where it has one: the next run may have had another GPU of the
    kind.
    """
    theirs = found.get(rival)
    times = gain(theirs, (theirs.beside if theirs else found).get(ours) or found.get(ours))
    return f"{times:.2f}x" if times else ""


def _share(floor: float, entry: Entry | None) -> str:
    return (
        f"{100 * floor / entry.median * entry.info.get('calls', 1):.0f} %"
        if entry and entry.median
        else ""
    )


def plan_table(entries: Sequence[Entry]) -> str:
    """Milliseconds an image of everyone, our gain, and the share of the device's limit that we
    reach.
    """
    groups = _grouped(entries)
    known = list(dict.fromkeys(e.who for e in entries))
    who = [r for r in RIVALS if r in known] + [r for r in known if r not in RIVALS]
    over = [(r, "ours") for r in OVER if r in known] + [
        (r, "ours-fp8") for r in known if r.endswith("fp8") and not r.startswith("ours")
    ]
    lines = [
        "Milliseconds an image, medians; guidance on; random weights, the same for all but "
        "diffusers' transformer. Limit:",
        "every call's products, or its weights read once, and the decoder's products, at the "
        "measured ceilings. Those are of large",
        "products, whose clocks the power limit holds back: batch 1 may come below it. First "
        "image: with loading, compiling and",
        "capturing, which a rival's first plan pays. Memory: peak of what torch holds, weights "
        "included.",
        "",
        *_head("plan", [*who, *(f"{mine} over {rival}" for rival, mine in over), *PLAN_COLUMNS]),
    ]
    for group, found in groups.items():
        info = next(iter(found.values())).info
        ours, fp8 = found.get("ours"), found.get("ours-fp8")
        pair = [found[r].info if r in found else None for r in ("ours", "max-autotune")]
        floor = (ours.info if ours else info)["floor"]
        lines.append(
            _row(
                [group]
                + [
                    f"{1e3 * found[r].median / info['batch']:.2f}" if r in found else ""
                    for r in who
                ]
                + [_over(found, rival, mine) for rival, mine in over]
                + [f"{1e3 * floor / info['batch']:.2f}", _share(floor, ours)]
                + [
                    f"{1e3 * fp8.info['floor'] / info['batch']:.2f}" if fp8 else "",
                    _share(fp8.info["floor"], fp8) if fp8 else "",
                ]
                + [f"{info['batch'] / ours.median:.1f}" if ours and ours.median else ""]
                + [_share(info["decode_seconds"], ours) if info["decode"] else ""]
                + [", ".join("" if p is None else f"{p['first_seconds']:.1f}" for p in pair)]
                + [
                    ", ".join(
                        ""
                        if p is None or p["peak_bytes"] is None
                        else f"{p['peak_bytes'] / 2**30:.1f}"
                        for p in pair
                    )
                ]
            )
        )
    settings = dict.fromkeys(
        f"{e.who}, batch {e.info['batch']}: {e.info['settings']}"
        for e in entries
        if e.info.get("settings")
    )
    return "\n".join([*lines, *([""] if settings else []), *(f"- {text}" for text in settings)])


def paper_table(entries: Sequence[Entry]) -> str:
    """FlowTurbo against Heun as the paper compares them: both compiled, and compiled against eager;
    and both in this library.
    """
    found: dict[tuple[int, int, bool], dict[tuple[str, str], Entry]] = defaultdict(dict)
    for e in entries:
        found[e.info["size"], e.info["batch"], e.info["decode"]][e.info["plan"], e.who] = e
    lines = _head("FlowTurbo, Heun", list(PAPER_WAYS))
    for (size, batch, decode), by in found.items():
        for turbo, heun in PAPER_PAIRS:
            gains = [
                gain(by.get((heun, theirs)), by.get((turbo, mine)))
                for mine, theirs in PAPER_WAYS.values()
            ]
            if any(gains):
                name = (
                    f"{turbo}, {heun}, {size}x{size} batch "
                    f"{batch}{' with decoding' if decode else ''}"
                )
                lines.append(_row([name, *(f"{g:.2f}x" if g else "" for g in gains)]))
    return "\n".join(lines) if len(lines) > 2 else "None of these pairs was measured."


def kernel_table(entries: Sequence[Entry]) -> str:
    """Microseconds of every provider, the gain over eager and compiled torch, and the share of the
    limit that ours reaches.
    """
    lines = [
        "Microseconds a call, medians of graph replays over rotating inputs (on a CPU: of plain "
        "calls). Limit: the larger of bytes",
        "over the copy's rate and operations over the product's. Ours: what `auto` takes, named "
        "in brackets.",
        "",
        *_head(
            "operation",
            [*KERNEL_COLUMNS, "ours over eager", "over compiled", "limit", "of the limit"],
        ),
    ]
    for group, found in _grouped(entries).items():
        ours, floor = found.get("auto"), next(iter(found.values())).info["floor"]
        cells = [
            f"{1e6 * found[p].median / found[p].info['calls']:.1f}" if p in found else ""
            for p in KERNEL_COLUMNS
        ]
        cells += [_over(found, p, "auto") for p in ("eager", "compiled")]
        taken = f" ({ours.info['backend']})" if ours else ""
        lines.append(_row([group + taken, *cells, f"{1e6 * floor:.1f}", _share(floor, ours)]))
    return "\n".join(lines)


def growth_table(curves: Mapping[str, Mapping[float, Info]]) -> str:
    lines = [
        "Milliseconds an image of ours, without decoding.",
        "",
        *_head("as it grows", ["at", "plan", "batch", "tokens", "ms", "limit"]),
    ]
    for curve, points in curves.items():
        for at, p in sorted(points.items()):
            times = [f"{p[key]:.2f}" for key in ("ms_an_image", "limit_ms_an_image")]
            lines.append(
                _row([curve, f"{at:g}", p["plan"], str(p["batch"]), str(p["tokens"]), *times])
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
