"""Evaluations on a training set that are not timed: plans share calls, and find the same."""

import pytest
from class_runs_small import class_settings
from quality_runs import Killed, read

import flowturbo.evaluation.class_quality as module
from flowturbo.evaluation.quality import evaluate
from flowturbo.sampling.velocity_field import GuidedField

PLANS = ("E2", "A3", "A2", "B3", "H1R1", "E4")
CALLS = 2 + 2 + 0 + 0 + 2 + 3
"""Of a batch: E2's, which are A2's and those of H1; A3's but the first, which are B3's, since the
two differ in the last step alone; the refiner's of R1; E4's but the first.
"""


pytestmark = pytest.mark.usefixtures("no_class_plot")


@pytest.fixture
def calls(monkeypatch):
    """The times of all network calls that are made, once the fine solution is there."""
    made, run = [], GuidedField._run

    def counted(self, network, x, t, v):
        made.append(t)
        return run(self, network, x, t, v)

    monkeypatch.setattr(GuidedField, "_run", counted)
    return made


def test_plans_that_are_not_timed_share_calls(networks, sets, tmp_path, calls):
    scales = dict(guidance=(1.0, 2.0), plans=PLANS)
    evaluate(class_settings(networks, sets, tmp_path / "timed", **scales))
    calls.clear()
    evaluate(class_settings(networks, sets, tmp_path / "not", timed=False, **scales))
    assert len(calls) == 2 * 3 * CALLS
    timed, shared = (
        {(row["label"], row["guidance"]): row for row in read(tmp_path / name)["rows"]}
        for name in ("timed", "not")
    )
    assert list(timed) == list(shared)
    for key, row in shared.items():
        assert row["ms_per_image"] is None
        for name in ("rms", "frechet", "kid"):
            assert row[name] == pytest.approx(timed[key][name], rel=1e-3, abs=1e-6), (key, name)
        assert row["record"] == timed[key]["record"]
    assert "| E2 | Euler | 2 | 0 | 2.00 |  | " in (tmp_path / "not" / "quality.md").read_text()


def test_a_killed_run_goes_on_where_each_plan_was(networks, sets, tmp_path, monkeypatch):
    done, measured = [], module._Measurement._measured

    def dying(self, *args):
        if len(done) in (1, 4, 5):
            done.append("killed")
            raise Killed
        done.append("batch")
        return measured(self, *args)

    options = dict(plans=("E2", "A2"), guidance=(2.0,), timed=False, held_out=None)
    evaluate(class_settings(networks, sets, tmp_path / "whole", **options))
    monkeypatch.setattr(module._Measurement, "_measured", dying)
    for _ in range(3):
        with pytest.raises(Killed):
            evaluate(class_settings(networks, sets, tmp_path / "killed", **options))
    evaluate(class_settings(networks, sets, tmp_path / "killed", **options))
    assert done.count("batch") == 6
    assert read(tmp_path / "killed")["rows"] == read(tmp_path / "whole")["rows"]


def test_digits_are_timed():
    with pytest.raises(ValueError, match="timed must be True without data, the training set"):
        module.Evaluate(timed=False)
