"""The search for several budgets in one go: shared calls, prices, resume, comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from close import assert_close
from tiny import CONFIG, tiny_model
from tuning_runs import read, small_search, write_weights

import flowturbo as ft
from flowturbo import Plan
from flowturbo.evaluation.statistics import family, jackknife_error
from flowturbo.runtime import rng
from flowturbo.sampling.shared_calls import SharedCalls, SharedField
from flowturbo.sampling.velocity_field import GuidedField
from flowturbo.solver.state import State
from flowturbo.tuning import several, tune
from flowturbo.tuning.budgets import budget_table, compared
from flowturbo.tuning.cost import CostModel, call_costs

LABELS = torch.tensor([3, 1, 7])


def end(field, plan: Plan, noise: torch.Tensor) -> torch.Tensor:
    state = State(noise)
    for step, t0, t1 in plan.schedule():
        state = step(field, state, t0, t1)
    return state.x


def test_shared_calls_change_no_bit_and_are_made_once():
    model, large, small = tiny_model(), SharedCalls(), SharedCalls(10_000)
    noise = rng.noise(model.latent_shape, 0, range(3))
    plans = list(map(Plan.parse, ("E3", "A3", "H1P2", "H2", "H1P1R1", "A2S1", "E3")))
    plans += [Plan.parse("E3", guidance_interval=(0.3, 1))]

    def agree(plan: Plan, labels: torch.Tensor, batch: str) -> None:
        plain = GuidedField(model, plan, labels, 1.5, model.guidance_channels)
        expected = end(plain, plan, noise)
        for calls in (large, small):
            field = SharedField(model, plan, labels, 1.5, calls, batch)
            assert end(field, plan, noise).equal(expected), plan
            assert calls.size <= calls.limit

    for plan in plans:
        agree(plan, LABELS, "a")
    # E3 makes 3; A3 one more, at 2/3; H1P2 two, since its first is Euler's; H2 three; the refiner
    # three; outside the interval one half, and what follows from it.
    share = model.macs[1] / model.macs[0]
    made = 3 * (3 + 1 + 2 + 3 + 3 * share + 0.5 + 2)
    assert large.made == pytest.approx(made)
    assert large.made + large.shared == pytest.approx(small.made + small.shared)
    assert small.made > made
    agree(plans[0], LABELS.flip(0), "b")
    assert large.made == pytest.approx(made + 9)


def test_rivals_of_a_budget_are_the_dearest_of_each_scheme_within_it():
    model = tiny_model()
    cost_model = CostModel(call_costs(model), 6.0)
    plans = several.published((3.0, 6.0), cost_model, True)
    named = {str(plan) for plan in plans}
    assert named >= {"E3", "A3", "B3", "U3", "D3", "H1", "X2", "H1P1", "E6", "A6", "U6", "D6"}
    assert named >= {"H3", "H1P4", "C6", "X3", "B6"}
    assert not named & {"E1", "E2", "E4", "A5", "C5", "H1P2", "H2P1"}
    refined = [plan for plan in plans if plan.cost.refiner]
    assert refined
    for plan in refined:
        cost = cost_model.of(plan)
        assert 2 < cost <= 3 or 5 < cost <= 6, plan
    assert {family(plan) for plan in plans} >= {"UniPC", "DPM-Solver++", "RES", "FlowTurbo"}


def row(plan: str, price: float, rms: float, group: str = "Euler", **more: float) -> dict:
    blocks = [rms + 0.01 * (i % 2) for i in range(10)]
    return {
        "plan": plan,
        "price": price,
        "rms": rms,
        "rms_error": 0.01,
        "rms_held": rms,
        "rms_blocks": blocks,
        "group": group,
        "how": "fitted" if more else "published",
        "predictor_calls": int(price),
        "refiner_calls": 0,
        **more,
    }


def test_a_budget_is_compared_with_the_best_of_each_scheme_by_the_paired_error():
    rows = [
        row("L3", 3.0, 0.3, "fitted", calibration_rms=0.2),
        row("L2", 2.0, 0.1, "fitted", calibration_rms=0.4),
        row("L4", 4.0, 0.1, "fitted", calibration_rms=0.1),
        row("E2", 2.0, 0.6),
        row("E3", 3.0, 0.5),
        row("U3", 3.0, 0.4, "UniPC"),
        row("H2", 4.0, 0.2, "Heun"),
        row("C4", 4.0, 0.0, "Adams-Bashforth"),
    ]
    rows[4]["rms_blocks"] = [0.5 + 0.03 * i for i in range(10)]
    found = compared(3.0, rows)
    assert (found["plan"], found["file"]) == ("L3", "best-3.json")
    assert [r["plan"] for r in found["rivals"]] == ["U3", "E3"]  # H2 is dearer, E2 farther
    unipc, euler = found["rivals"]
    assert unipc["gain_error"] < 1e-15
    assert unipc["outcome"] == "better"
    error = jackknife_error(
        [b - a for a, b in zip(rows[0]["rms_blocks"], rows[4]["rms_blocks"], strict=True)]
    )
    assert euler["standard_errors"] == pytest.approx(0.2 / error)
    assert euler["outcome"] == ("better" if 0.2 / error > 2 else "level")
    assert found["better_than_all"] == (0.2 / error > 2)
    assert compared(1.5, rows) is None
    exact = compared(4.0, rows)["rivals"][0]  # the fine solution itself
    assert (exact["plan"], exact["outcome"]) == ("C4", "worse")
    text = "\n".join(budget_table([found, compared(4.0, rows)]))
    assert "| 3 | L3 | 3.00 | 0.3000 ± 0.0100 | 0.3000 | U3 (UniPC) | 0.4000 | 25% |" in text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def settings(weights: Path, out: Path, **options: object) -> tune.Tune:
    defaults = dict(
        calls=(2.6, 3.6),
        images=20,
        calibration_images=8,
        batch_size=4,
        reference_plan="A6",
        refiner_steps=1,
        iterations=1,
        timed=False,
        held="spread",
    )
    return small_search(weights, out, **{**defaults, **options})


def test_each_budget_has_a_plan_a_file_and_rivals(weights, tmp_path):
    tune.tune(settings(weights, tmp_path, calls=(2, 3), refiner_steps=0))
    found, text = read(tmp_path), (tmp_path / "tuning.md").read_text(encoding="utf-8")
    assert [b["budget"] for b in found["budgets"]] == [2, 3]
    assert not (tmp_path / "unfinished.json").exists()
    assert "| budget | plan |" in text
    assert "ms_per_image" not in found["rows"][0]
    assert found["network_calls"]["shared"] > 0
    model = ft.load(weights / "predictor.safetensors", heads=CONFIG.heads, device="cpu")
    labels = [i % 10 for i in range(20)]
    for b in found["budgets"]:
        plan = Plan.load(tmp_path / b["file"])
        assert plan.cost.predictor == b["price"] == b["budget"]
        assert b["calibration_rms"] == min(
            row["calibration_rms"]
            for row in found["rows"]
            if row["how"] != "published" and row["price"] <= b["budget"]
        )
        got, fine = (ft.sample(model, p, labels, seed=0, guidance=1.5) for p in (plan, "A6"))
        assert_close((got - fine).square().mean().sqrt(), torch.tensor(b["rms"]), 1e-4)
        assert {"Euler", "Adams-Bashforth", "Heun"} <= {r["scheme"] for r in b["rivals"]}
    assert {"UniPC", "DPM-Solver++", "RES"} <= {r["scheme"] for r in found["budgets"][1]["rivals"]}


@pytest.mark.slow
def test_a_search_for_two_budgets_that_is_killed_anywhere_ends_alike(
    weights, tmp_path, monkeypatch
):
    def killed(*rest, **more):
        raise KeyboardInterrupt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune.tune(settings(weights, whole))
    for place in ("rms_error", "fit_weights", "foreseen_errors"):
        with monkeypatch.context() as patched:
            patched.setattr(several, place, killed)
            with pytest.raises(KeyboardInterrupt):
                tune.tune(settings(weights, parts))
    assert (parts / "unfinished.json").exists()
    with monkeypatch.context() as patched:  # only the solutions of the measurement are missing
        patched.setattr("flowturbo.tuning.batches.sample", killed)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(settings(weights, parts))
    tune.tune(settings(weights, parts))
    ours, theirs = read(whole), read(parts)
    assert ours["rows"] == theirs["rows"]
    assert ours["budgets"] == theirs["budgets"]
    assert any(row["refiner_calls"] for row in ours["rows"] if row["how"] == "fitted")
    # A budget is added, and what was there is not made again.
    tune.tune(settings(weights, whole, calls=(1.0, 2.6, 3.6)))
    added = read(whole)["budgets"]
    assert [b["budget"] for b in added] == [1.0, 2.6, 3.6]
    assert added[2]["rms"] <= 1.5 * ours["budgets"][1]["rms"]


def test_classes_that_are_held_apart_are_spread_over_all(tmp_path):
    spread = tune.Tune(out=tmp_path, held="spread")
    last = tune.Tune(out=tmp_path)
    assert spread.held_classes_of(42) == [2, 7, 13, 18, 23, 28, 34, 39]
    assert last.held_classes_of(42) == list(range(34, 42))
    assert tune.Tune(out=tmp_path, held="spread", held_classes=0).held_classes_of(42) == []
    assert spread.held_classes_of(3) == []


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(budget_calls=3.0), "give calls or one budget, not both"),
        (dict(budget_ms=3.0), "give calls or one budget, not both"),
        (dict(calls=(), budget_ms=3.0), "timed must be True for a budget in milliseconds"),
        (dict(calls=(0.5,)), "calls must be at least 1 each, got 0.5"),
        (dict(calls=(float("nan"),)), "calls must be finite"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options, said, weights, tmp_path):
    with pytest.raises(ValueError, match=said):
        settings(weights, tmp_path, **options)
