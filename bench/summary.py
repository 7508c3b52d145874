"""What a reader needs if all else is lost, a line for a part of gpu_check.sh: python
bench/summary.py LINES PART DEVICE
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from pathlib import Path

from report import Device, Entry, gain, read


def line(part: str, device: Device) -> str:
    """'plans: H1P5R3 256x256 batch 8 with decoding 6.10 ms an image, limit 5.00, ... on NVIDIA H100
    80GB HBM3'
    """
    run = device.last_run(part)
    stages = device.stages.get(run or "", {})
    say = {"correct": _correct, "kernels": _kernels, "growth": _growth}.get(part, _plans)
    troubles = [
        f"{stage.name} {stage.ended}" for stage in stages.values() if stage.ended != "passed"
    ]
    return f"{part}: {say(device, run)} on {device.name}" + (
        f"; NOT PASSED: {', '.join(troubles)}" if troubles else ""
    )


def _correct(device: Device, run: str | None) -> str:
    counts = Counter(device.tests.values())
    asked = [f"{counts['passed']} passed, {counts['failed']} failed"]
    asked += [
        f"{counts[outcome]} {outcome}" for outcome in ("skipped", "not reached") if counts[outcome]
    ]
    stages = device.stages.get(run or "", {})
    for name, good in (
        ("build", "extension built"),
        ("sanitizer", "nothing found by compute-sanitizer"),
    ):
        if name in stages and stages[name].ended == "passed":
            asked.append(good)
    return ", ".join(asked)


def _kernels(device: Device, run: str | None) -> str:
    mine = {e.group: e for e in device.of("op") if e.who == "auto" and e.run == run}
    parts = [f"{len(mine)} operations measured"]
    for rival in ("eager", "compiled"):
        theirs = {
            e.group: e
            for e in device.of("op")
            if e.who == rival and e.run == run and e.group in mine
        }
        gains = [g for group, e in theirs.items() if (g := gain(e, mine[group]))]
        if gains:
            wins = sum(g >= 1 for g in gains)
            parts.append(
                f"{statistics.median(gains):.2f}x {rival} (median of {len(gains)}, slower in "
                f"{len(gains) - wins})"
            )
    return ", ".join(parts)


def _plans(device: Device, run: str | None) -> str:
    """Of the first plan of the run, at each batch size: ours, its limit, and how many times as fast
    as each rival.
    """
    entries = [e for e in device.of("plan") if e.run == run]
    first = next((e.info["plan"] for e in entries), None)
    groups: dict[str, dict[str, Entry]] = {}
    for e in entries:
        if e.info["plan"] == first:
            groups.setdefault(e.group, {})[e.who] = e
    return "; ".join(_plan(group, found) for group, found in groups.items()) or "nothing measured"


def _plan(group: str, found: dict[str, Entry]) -> str:
    """One group: what ours takes, then the rivals, those that multiply in fp8 against ours in
    fp8.
    """
    parts = []
    for who in ("ours", "ours-fp8"):
        if who in found:
            e = found[who]
            ms = 1e3 / e.info["batch"]
            parts.append(
                f"{who} {e.median * ms:.2f} ms an image (limit {e.info['floor'] * ms:.2f})"
            )
    for who, e in found.items():
        mine = found.get("ours-fp8" if who.endswith("fp8") else "ours")
        if not who.startswith("ours"):
            times = gain(e, mine)
            parts.append(
                f"{times:.2f}x {who}"
                if times
                else f"{who} {1e3 * e.median / e.info['batch']:.2f} ms an image"
            )
    return f"{group} {', '.join(parts)}"


def _growth(device: Device, run: str | None) -> str:
    points = [
        (curve, at, p)
        for curve, found in device.growth.items()
        for at, p in found.items()
        if p["run"] == run
    ]
    batches = sorted((at, p["ms_an_image"]) for curve, at, p in points if curve == "batch")
    ends = batches[:1] + batches[1:][-1:]
    return f"{len(points)} points measured" + "".join(
        f", batch {at} {ms:.2f} ms an image" for at, ms in ends
    )


if __name__ == "__main__":
    path, part, name = sys.argv[1:]
    print(line(part, read([Path(path)]).get(name) or Device(name)))
