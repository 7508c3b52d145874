"""A pytest plugin: whatever ends is appended, as a line of JSON, to the file that
FLOWTURBO_BENCH_LINES names.

pytest-benchmark writes its report when all is over: a run that is killed leaves none, and one that
is interrupted before the first round of a benchmark can't write it. Lines are there whatever
happens to the run. bench/conftest.py brings the plugin along; elsewhere it is `-p lines` with
bench/ on PYTHONPATH. The kinds of lines, each with the run and stage that the environment names:

- planned: items, the tests that were collected: id, and group and who where the test's module has
    about(**parameters)
- ended: one of these with its outcome, why it was skipped or failed, and measured: seconds, and the
    benchmark's extra_info
- run, stage, growth: by bench/gpu_check.sh and bench/growth.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

FILE, RUN, STAGE = "FLOWTURBO_BENCH_LINES", "FLOWTURBO_BENCH_RUN", "FLOWTURBO_BENCH_STAGE"


def append(kind: str, **fields: Any) -> None:
    """One line, in one write, so that lines of several processes do not mix; nothing where no file
    is named.
    """
    path = os.environ.get(FILE)
    if not path:
        return
    record = {
        "kind": kind,
        "run": os.environ.get(RUN, ""),
        "stage": os.environ.get(STAGE, ""),
        **fields,
    }
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def _about(item: pytest.Item) -> dict[str, Any]:
    tell = getattr(getattr(item, "module", None), "about", None)
    callspec = getattr(item, "callspec", None)
    return tell(**callspec.params) if tell and callspec else {}


def _measured(item: Any) -> dict[str, Any] | None:
    benchmark = item.funcargs.get("benchmark")
    timed = getattr(benchmark, "stats", None)
    if timed is None or not timed.stats.data:
        return None
    stats = {name: getattr(timed.stats, name) for name in ("median", "min", "max", "rounds")}
    return {"group": benchmark.group, "stats": stats, "info": benchmark.extra_info}


def _why(report: pytest.TestReport) -> str:
    """The reason of a skip, or the first line of an error."""
    if report.skipped:
        return str(
            report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        ).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr or "")
    return text.strip().split("\n")[0][:300]


# A worker of xdist sends its reports to the process that started it, which alone writes.


def _works_for_another(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


class Writer:
    """Of one pytest session that writes."""

    def __init__(self) -> None:
        self.planned = False

    def plan(self, items: list[dict[str, Any]]) -> None:
        if items and not self.planned:
            self.planned = True
            append("planned", items=items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.plan([{"id": item.nodeid, **_about(item)} for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.plan([{"id": name} for name in ids])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            ended = getattr(report, "flowturbo", {})
            outcome = (
                {"outcome": report.outcome}
                if report.passed
                else {"outcome": report.outcome, "why": _why(report)}
            )
            append("ended", id=report.nodeid, **outcome, **ended)


def pytest_configure(config: pytest.Config) -> None:
    if (
        not _works_for_another(config)
        and os.environ.get(FILE)
        and not config.pluginmanager.has_plugin("flowturbo writer")
    ):
        config.pluginmanager.register(Writer(), "flowturbo writer")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    found = dict(_about(item))
    if report.when == "call" and report.passed and (measured := _measured(item)):
        found["measured"] = measured
    if found:
        report.flowturbo = found
