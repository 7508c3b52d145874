"""Reports of benchmarks are read as they are, and what is compared is of one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import plan_tables
import report
import summary
import table

H200 = "NVIDIA H200"


def line(kind: str, stage: str = "s", **fields: object) -> str:
    return json.dumps({"kind": kind, "run": "plans 1", "stage": stage, **fields}) + "\n"


def test_a_report_that_was_cut_in_a_line_is_read(tmp_path):
    measured = {
        "group": "H1",
        "stats": {"median": 2.0},
        "info": {"device": H200, "plan": "H1", "batch": 1, "floor": 1.0},
    }
    text = line("run", part="plans", facts={"device": H200})
    text += line(
        "planned", items=[{"id": name, "group": "H1", "who": name} for name in ("ours", "eager")]
    )
    text += line("ended", id="ours", outcome="passed", group="H1", who="ours", measured=measured)
    (tmp_path / "a.jsonl").write_text(text + '{"kind": "ended", "id": "eag')
    [device] = report.read([tmp_path]).values()
    assert device.entries["H1", "ours"].median == 2.0
    assert device.missing == {("H1", "eager"): "not reached: s was cut short"}
    assert (
        summary.line("plans", device)
        == f"plans: H1 ours 2000.00 ms an image (limit 1000.00) on {H200}"
    )


def test_a_report_that_is_none_is_refused_by_name_and_passed_over_in_a_folder(tmp_path):
    (tmp_path / "growth.json").write_text('{"curves": {}}')
    assert report.read([tmp_path]) == {}
    with pytest.raises(ValueError, match=r"growth\.json is no report of pytest-benchmark"):
        report.read([tmp_path / "growth.json"])
    assert table.page({}).endswith("Nothing was measured.\n")


# Several runs


class Lines:
    """A report as runs of gpu_check.sh append to it."""

    def __init__(self, path: Path) -> None:
        self.path, self.text, self.run = path / "device.jsonl", "", ""

    def add(self, kind: str, **fields: Any) -> None:
        self.text += json.dumps({"kind": kind, "run": self.run, "stage": "s", **fields}) + "\n"

    def begin(self, run: str) -> None:
        self.run = run
        self.add("run", part=run.split()[0], facts={"device": H200, "torch": "2.11"})

    def measured(self, who: str, seconds: float, plan: str = "H1", **info: Any) -> None:
        info = dict(
            **dict(rival=who, plan=plan, size=256, batch=1, decode=False, device=H200),
            **dict(dtype="bfloat16", torch="2.11", floor=0.5, ceilings={}, decode_seconds=0.0),
            **{"first_seconds": seconds, "peak_bytes": 1 << 30, "caches": "cold", **info},
        )
        measured = {"group": f"{plan} batch 1", "stats": {"median": seconds}, "info": info}
        self.add(
            "ended", id=who, outcome="passed", group=f"{plan} batch 1", who=who, measured=measured
        )

    def wrong(self, who: str) -> None:
        why = "wrong: latents are 99.0% from plain eager torch's, expected 4.0%"
        self.add("ended", id=who, outcome="failed", group="H1 batch 1", who=who, why=why)

    def device(self) -> report.Device:
        self.path.write_text(self.text)
        [device] = report.read([self.path]).values()
        return device


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    return Lines(tmp_path)


def cell(text: str, name: str, column: str) -> str:
    heads, row = (
        [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if line.startswith((f"| {name}", "| plan ", "| FlowTurbo"))
    )
    return row[heads.index(column)]


def test_ours_of_a_later_run_stands_beside_no_rival_of_an_earlier(lines):
    lines.begin("max-autotune-1 1")
    lines.measured("ours", 4.0, peak_bytes=3 << 30)
    lines.measured("max-autotune", 8.0)
    lines.begin("plan-graph-1 2")
    lines.measured("ours", 1.0)
    text = plan_tables.plan_table(lines.device())
    assert cell(text, "H1", "ours") == "1000.00"
    assert cell(text, "H1", "ours over max-autotune") == "2.00x"
    assert cell(text, "H1", "first image, s (ours, max-autotune)") == "4.0, 8.0"
    assert cell(text, "H1", "memory, GiB (ours, max-autotune)") == "3.0, 1.0"


def test_a_rival_without_ours_in_its_run_is_compared_with_nothing(lines):
    lines.begin("plans-1 1")
    lines.measured("ours", 4.0)
    lines.begin("max-autotune-1 2")
    lines.measured("max-autotune", 8.0)
    text = plan_tables.plan_table(lines.device())
    assert cell(text, "H1", "ours over max-autotune") == ""
    assert cell(text, "H1", "first image, s (ours, max-autotune)") == ", 8.0"


def test_a_first_image_with_warm_caches_says_so(lines):
    lines.begin("max-autotune-1 1")
    lines.measured("ours", 4.0)
    lines.measured("max-autotune", 8.0, caches="warm")
    text = plan_tables.plan_table(lines.device())
    assert cell(text, "H1", "first image, s (ours, max-autotune)") == "4.0, 8.0 (warm caches)"


def test_the_papers_pairs_are_of_one_run(lines):
    """FlowTurbo of a later run beside Heun of an earlier one would be another GPU's gain."""
    lines.begin("plans-1 1")
    for who, turbo, heun in (("ours", 1.0, 3.0), ("compile", 2.0, 4.0)):
        lines.measured(who, turbo, "H2P4R2")
        lines.measured(who, heun, "H8")
    lines.begin("plan-graph-1 2")
    lines.measured("ours", 0.1, "H2P4R2")
    text = plan_tables.paper_table(lines.device())
    assert cell(text, "H2P4R2", "both ours") == "3.00x"
    assert cell(text, "H2P4R2", "ours, against compiled Heun") == "4.00x"
    assert cell(text, "H2P4R2", "both compiled") == "2.00x"
    lines.measured("ours", 0.2, "H8")
    assert cell(plan_tables.paper_table(lines.device()), "H2P4R2", "both ours") == "2.00x"


def test_what_is_wrong_has_no_time_and_is_called_wrong(lines):
    lines.begin("plans-1 1")
    for who in ("ours", "eager", "compile"):
        lines.measured(who, 4.0, apart={"latents": 0.0123})
    lines.measured("compile", 4.0, "H2")
    lines.begin("plans-1 2")
    lines.wrong("compile")
    page = table.page({H200: lines.device()})
    assert cell(page, "H1", "compile") == "wrong"
    assert cell(page, "H1", "ours over compile") == ""
    assert "- compile, wrong: latents are 99.0% from plain eager torch's, expected 4.0%: H1" in page
    assert "- latents from plain eager torch's, of what the plan changed" in page
    assert "at most: ours 1.2 %, eager 1.2 %" in page
