"""Tables of whole plans: everyone's times, and the paper's comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cells import beside, differences, grouped, head, over, row, share
from report import Device, Entry, gain

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


ABOUT = """\
Milliseconds an image, medians; guidance on; random weights, the same for all but diffusers'
transformer. A gain is of one run. "wrong": its results are not plain eager torch's, and it was not
timed. Limit: every call's products, or its weights read once, and the decoder's products, at the
measured ceilings. Those are of large products, whose clocks the power limit holds back: batch 1 may
come below it. First image: with loading, compiling and capturing, which a rival's first plan pays;
both of one run; with caches of Triton and Inductor that were empty, unless it says warm. Memory:
peak of what torch holds, weights included, of the same run.
"""


def plan_table(device: Device) -> str:
    """Milliseconds an image of everyone, our gain, and the share of the device's limit that we
    reach.
    """
    entries = device.of("plan")
    known = list(dict.fromkeys(e.who for e in entries))
    who = [r for r in RIVALS if r in known] + [r for r in known if r not in RIVALS]
    compared = [(r, "ours") for r in OVER if r in known] + [
        (r, "ours-fp8") for r in known if r.endswith("fp8") and not r.startswith("ours")
    ]
    columns = [*who, *(f"{mine} over {rival}" for rival, mine in compared), *PLAN_COLUMNS]
    rows = []
    for group, found in grouped(entries).items():
        cells = [_milliseconds(device, group, found, rival) for rival in who]
        cells += [over(found, rival, mine) for rival, mine in compared]
        rows.append(row([group, *cells, *_limits(found), *_first_and_memory(found)]))
    notes = [*differences(entries), *_settings(entries)]
    return "\n".join([ABOUT, *head("plan", columns), *rows, *([""] if notes else []), *notes])


def _milliseconds(device: Device, group: str, found: Mapping[str, Entry], who: str) -> str:
    if who in found:
        return f"{1e3 * found[who].median / found[who].info['batch']:.2f}"
    return "wrong" if device.is_wrong(group, who) else ""


def _limits(found: Mapping[str, Entry]) -> list[str]:
    """PLAN_COLUMNS up to "decoding"."""
    info = next(iter(found.values())).info
    ours, fp8 = found.get("ours"), found.get("ours-fp8")
    limit = (ours.info if ours else info)["floor"]
    return [
        f"{1e3 * limit / info['batch']:.2f}",
        share(limit, ours),
        f"{1e3 * fp8.info['floor'] / info['batch']:.2f}" if fp8 else "",
        share(fp8.info["floor"], fp8) if fp8 else "",
        f"{info['batch'] / ours.median:.1f}" if ours and ours.median else "",
        share(info["decode_seconds"], ours) if info["decode"] else "",
    ]


def _first_and_memory(found: Mapping[str, Entry]) -> list[str]:
    """Of one run: of the next, caches, memory or the GPU itself may be others."""
    theirs = found.get("max-autotune")
    pair = beside(theirs, "ours") if theirs else found.get("ours"), theirs
    return [", ".join("" if e is None else tell(e) for e in pair) for tell in (_first, _memory)]


def _first(e: Entry) -> str:
    return f"{e.info['first_seconds']:.1f}" + (
        "" if e.info.get("caches") == "cold" else " (warm caches)"
    )


def _memory(e: Entry) -> str:
    return "" if e.info["peak_bytes"] is None else f"{e.info['peak_bytes'] / 2**30:.1f}"


def _settings(entries: Sequence[Entry]) -> list[str]:
    found = dict.fromkeys(
        f"{e.who}, batch {e.info['batch']}: {e.info['settings']}"
        for e in entries
        if e.info.get("settings")
    )
    return [f"- {text}" for text in found]


def paper_table(device: Device) -> str:
    """FlowTurbo against Heun as the paper compares them: both compiled, and compiled against eager;
    and both in this library. Each gain is of one run, the last that has both.
    """
    runs: dict[tuple[str, int, int, bool], dict[tuple[str, str], Entry]] = defaultdict(dict)
    for e in device.all_of("plan"):
        at = e.run, e.info["size"], e.info["batch"], e.info["decode"]
        runs[at][e.info["plan"], e.who] = e
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for (_, size, batch, decode), by in runs.items():
        for turbo, heun in PAPER_PAIRS:
            name = f"{turbo}, {heun}, {size}x{size} batch {batch}"
            name += " with decoding" if decode else ""
            for way, (mine, theirs) in PAPER_WAYS.items():
                times = gain(by.get((heun, theirs)), by.get((turbo, mine)))
                if times:
                    rows[name][way] = f"{times:.2f}x"
    if not rows:
        return "None of these pairs was measured."
    lines = [
        row([name, *(found.get(way, "") for way in PAPER_WAYS)]) for name, found in rows.items()
    ]
    return "\n".join([*head("FlowTurbo, Heun", list(PAPER_WAYS)), *lines])
