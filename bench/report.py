"""Reports of benchmarks, read: lines as bench/lines.py writes them, and pytest-benchmark's JSON.
Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Info = Mapping[str, Any]

WRONG = "wrong: "
"""How the reason begins why something is not timed whose results were compared and are wrong."""


class Entry(NamedTuple):
    """One benchmark: of `group`, by `who`, in the run of that name. median: seconds of info's
    `calls` calls, or of a batch.

    beside: by whom else the group was measured in the same run.
    """

    group: str
    who: str
    median: float
    info: Info
    run: str
    beside: Mapping[str, Entry]


def gain(theirs: Entry | None, mine: Entry | None) -> float | None:
    """How many times as fast mine is, a call or a batch; None where one is missing or no time was
    seen.
    """
    if theirs is None or mine is None or not mine.median:
        return None
    return (theirs.median / theirs.info.get("calls", 1)) / (mine.median / mine.info.get("calls", 1))


class Stage(NamedTuple):
    """A stage of gpu_check.sh. ended: "passed", or in words how it did not."""

    name: str
    seconds: float
    limit: float
    ended: str


@dataclass
class Device:
    """All that is known of one device. Of what was measured twice the last counts.

    runs: run -> what its figures depend on. missing: (group, who) -> why it was not measured.
    tests: id -> outcome, of the last run of the tests; failures: id -> why. growth: curve ->
        abscissa -> point.
    """

    name: str
    runs: dict[str, Info] = field(default_factory=dict)
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    stages: dict[str, dict[str, Stage]] = field(default_factory=dict)
    growth: dict[str, dict[float, Info]] = field(default_factory=dict)
    _beside: dict[tuple[str, str], dict[str, Entry]] = field(default_factory=dict)

    def of(self, key: str) -> list[Entry]:
        """The entries whose info has that key: "op" of operations, "plan" of plans."""
        return [entry for entry in self.entries.values() if key in entry.info]

    def all_of(self, key: str) -> list[Entry]:
        """As `of`, with those that a later run has measured again, in the order of the runs."""
        entries = [e for beside in self._beside.values() for e in beside.values()]
        return [entry for entry in entries if key in entry.info]

    def is_wrong(self, group: str, who: str) -> bool:
        return self.missing.get((group, who), "").startswith(WRONG)

    def last_run(self, part: str) -> str | None:
        """The name of the last run of a part of gpu_check.sh."""
        return next(
            (run for run, facts in reversed(self.runs.items()) if facts.get("part") == part), None
        )

    def take(self, group: str, who: str, median: float, info: Info, run: str) -> None:
        beside = self._beside.setdefault((run, group), {})
        beside[who] = self.entries[group, who] = Entry(group, who, median, info, run, beside)
        self.missing.pop((group, who), None)

    def forget(self, group: str, who: str) -> None:
        self.entries.pop((group, who), None)
        for (_, of), beside in self._beside.items():
            if of == group:
                beside.pop(who, None)


def read(paths: Iterable[Path]) -> dict[str, Device]:
    """Devices by name, from files and from folders of them. ValueError if a named file is no
    report.
    """
    devices: dict[str, Device] = {}
    for path in paths:
        for file in (
            sorted([*path.glob("*.jsonl"), *path.glob("*.json")]) if path.is_dir() else [path]
        ):
            if file.suffix == ".jsonl":
                _read_lines(file, devices)
            else:
                _read_json(file, devices, named=file == path)
    return devices


def _device(devices: dict[str, Device], name: str) -> Device:
    return devices.setdefault(name, Device(name))


def _who(info: Info) -> str:
    return str(info.get("rival") or info.get("provider"))


def _read_json(file: Path, devices: dict[str, Device], named: bool) -> None:
    try:
        benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    except (ValueError, KeyError, TypeError):
        if named:
            raise ValueError(f"{file} is no report of pytest-benchmark") from None
        return
    for found in benchmarks:
        info = found["extra_info"]
        if "device" in info:
            _device(devices, info["device"]).take(
                found["group"], _who(info), found["stats"]["median"], info, ""
            )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the end of a run that was killed while writing
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


def _read_lines(file: Path, devices: dict[str, Device]) -> None:
    device: Device | None = None  # of the run that is read; lines outside any run name theirs
    planned: dict[tuple[str, str], dict[str, Info]] = {}
    for record in _records(file):
        kind, at = record["kind"], (record.get("run", ""), record.get("stage", ""))
        if kind == "run":
            device = _device(devices, record["facts"]["device"])
            device.runs[at[0]] = {"part": record.get("part"), **record["facts"]}
            if record.get("part") == "correct":
                device.tests.clear()
                device.failures.clear()
        elif kind == "growth":
            curve = _device(devices, record["device"]).growth.setdefault(record["curve"], {})
            curve[record["point"]["at"]] = {"run": at[0], **record["point"]}
        elif kind == "ended" and record.get("measured"):
            planned.get(at, {}).pop(record["id"], None)
            group, stats, info = (record["measured"][key] for key in ("group", "stats", "info"))
            _device(devices, info["device"]).take(
                group, record.get("who") or _who(info), stats["median"], info, at[0]
            )
        elif device is None:
            continue
        elif kind == "planned":
            planned[at] = {item["id"]: item for item in record["items"]}
        elif kind == "ended":
            planned.get(at, {}).pop(record["id"], None)
            _ended(device, record)
        elif kind == "stage":
            found = Stage(at[1], record["seconds"], record["limit"], record["ended"])
            device.stages.setdefault(at[0], {})[at[1]] = found
    for (run, stage), items in planned.items():
        if device is not None:
            _unreached(device, run, stage, items.values())


def _ended(device: Device, record: dict[str, Any]) -> None:
    outcome, why = record["outcome"], record.get("why", "")
    if "who" in record:
        key = record["group"], record["who"]
        if why.startswith(WRONG):  # and so may have been what was timed before
            device.forget(*key)
            device.missing[key] = why
        elif outcome == "failed" or key not in device.entries:
            device.missing[key] = f"failed: {why}" if outcome == "failed" else why
    elif (
        outcome != "passed" or device.tests.get(record["id"]) != "failed"
    ):  # a teardown can fail after the test has passed
        device.tests[record["id"]] = outcome
        if outcome == "failed":
            device.failures[record["id"]] = why


def _unreached(device: Device, run: str, stage: str, items: Iterable[Info]) -> None:
    """What was collected and never ended."""
    ended = device.stages.get(run, {}).get(stage)
    why = f"not reached: {stage} {ended.ended if ended else 'was cut short'}"
    for item in items:
        if "who" in item:
            key = item["group"], item["who"]
            if key not in device.entries:
                device.missing.setdefault(key, why)
        elif run == device.last_run("correct"):
            device.tests.setdefault(item["id"], "not reached")
