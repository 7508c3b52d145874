"""The search for plans, which keeps to its budget and its noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_recorder import captured_model
from tiny import CONFIG, tiny_model
from tuning_runs import read, small_search, write_weights

import flowturbo as ft
from flowturbo import Plan
from flowturbo.runtime import rng
from flowturbo.storage.resume import Keep
from flowturbo.tuning import cost, search, tune
from flowturbo.tuning.cost import CostModel, call_costs, step_costs
from flowturbo.tuning.report import against


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.4, 2.3])
def test_every_plan_that_is_tried_keeps_to_the_budget(budget):
    model = tiny_model()
    cost_model = CostModel(call_costs(model), budget)
    sequences = search.affordable(cost_model, True, [(0.0, 1.0), (0.2, 0.8)])
    tried = sequences + tune.published(cost_model, True)
    share = model.macs[1] / model.macs[0]
    for plan in tried:
        calls = plan.cost
        halves = calls.guided_predictor + calls.predictor
        halves += share * (calls.guided_refiner + calls.refiner)
        assert halves / 2 <= budget + 1e-6, plan
    assert bool(tried) == (budget >= 1)
    assert len(sequences) == len({(plan.letters, plan.guidance_interval) for plan in sequences})


def test_prices_are_those_of_the_calls_that_a_plan_makes():
    steps = {**dict.fromkeys("EPUD", 1.0), "H": 2.0, "X": 2.0, "R": 0.25}
    cost_model = CostModel(steps, 10.0, fixed=0.5)
    for text, calls in (
        *(("E3", 3), ("P3", 4), ("H1P2", 4), ("H1P2R2", 4.5)),
        *(("U4", 4), ("D4", 4), ("X3", 5), ("X1", 1), ("X2U2", 6), ("U2X1", 3), ("X1R1", 2.25)),
    ):
        assert cost_model.of(Plan.parse(text)) == pytest.approx(0.5 + calls)
    half = Plan.parse("E4", guidance_interval=(0.4, 1.0))  # calls at 0, 1/4, 1/2, 3/4
    assert cost_model.of(half) == pytest.approx(0.5 + 3)


@pytest.mark.slow
def test_step_costs_are_told_for_each_kind_of_step():
    costs = step_costs(tiny_model(), 1.5, 4, True)
    assert costs.keys() == {*"EHPABCUDXLRSM", "fixed"}
    assert min(costs.values()) >= 0
    assert costs["H"] > 0
    assert not {"R", "S", "M"} & step_costs(tiny_model(refiner=False), 1.0, 4, False).keys()


def test_plans_that_are_timed_take_turns_and_are_captured_once_each(monkeypatch):
    """More than are kept otherwise: they would be captured in every run, and that be timed."""
    model, recorder = captured_model()
    model.captures.limit = 2
    plans = [Plan.parse(text) for text in ("E1", "E2", "H1", "H1P1")]
    # Two runs each before the timed ones, which take 9, 8, 7, 6 s, then 10, 5, 8, 7 s, then 11, 12,
    # 13, 14 s.
    passed, calls = iter([1] * 8 + [9, 8, 7, 6, 10, 5, 8, 7, 11, 12, 13, 14]), []

    def seconds(run, device, real=cost.seconds):
        real(run, device)
        return next(passed)

    monkeypatch.setattr(cost, "seconds", seconds)
    times = cost.milliseconds(model, plans, 1.5, 3, turns=3, advance=calls.append)
    assert recorder.recorded == len(plans)
    assert model.captures.limit == 2
    assert sum(calls) == 3 * (1 + 2 + 2 + 3) * (2 + 3)
    assert times == [1e3 * second / 3 for second in (9, 5, 7, 6)]


def test_a_verdict_asks_for_two_standard_errors():
    def row(price: float, rms: float, spread: float) -> dict:
        return {
            "price": price,
            "ms_per_image": 10 - price,
            "rms": rms,
            "rms_blocks": [rms - spread, rms + spread] * 5,
        }

    rivals = [row(1.0, 0.5, 0.0), row(2.0, 0.3, 0.0), row(3.0, 0.1, 0.0)]
    assert against(row(2.0, 0.2, 0.0), rivals, "rms") == ("better", rivals[1])
    assert against(row(2.0, 0.2, 0.1), rivals, "rms") == ("level", rivals[1])
    assert against(row(2.9, 0.4, 0.001), rivals, "rms") == ("worse", rivals[1])
    assert against(row(0.5, 0.4, 0.001), rivals, "rms") == ("no rival", None)
    assert against(row(2.0, 0.2, 0.0), rivals, "rms", "ms_per_image") == ("worse", rivals[2])
    assert against(row(4.0, 0.2, 0.0), rivals, "rms", "ms_per_image") == ("no rival", None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def settings(weights: Path, out: Path, **options: object) -> tune.Tune:
    defaults = dict(
        budget_calls=2.2,
        images=20,
        calibration_images=12,
        batch_size=6,
        reference_plan="C8",
        refiner_steps=1,
    )
    return small_search(weights, out, **{**defaults, "iterations": 2, **options})


@pytest.fixture(scope="module")
def tuned(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    tune.tune(settings(weights, out))
    return out


def test_tune_writes_table_figures_plot_and_the_best_plan(tuned, weights):
    results = read(tuned)
    table = (tuned / "tuning.md").read_text()
    assert (tuned / "tuning.png").read_bytes()[1:4] == b"PNG"
    plans = [row for row in results["rows"] if row["how"] in ("fitted", "searched")]
    assert {row["plan"] for row in results["rows"]} >= {"L1", "L2", "A2", "E1", "H1"}
    assert all(f"| {row['plan']} | {row['group']} |" in table for row in results["rows"])
    for row in results["rows"]:
        others = [(other["price"], other["rms"]) for other in results["rows"]]
        beaten = any(
            p <= row["price"] and d <= row["rms"] and (p, d) != (row["price"], row["rms"])
            for p, d in others
        )
        assert row["on_front"] == (not beaten), row["plan"]
        assert (f"**{row['rms']:.4f} ± {row['rms_error']:.4f}**" in table) == row["on_front"]
    best = Plan.load(tuned / "best.json")
    least = min(plans, key=lambda row: row["calibration_rms"])
    assert best == Plan.from_record(least["record"])
    assert all(row["price"] <= 2.2 + 1e-9 for row in results["rows"])
    for row in results["rows"]:
        if row["how"] == "fitted":
            assert Plan.load(
                tuned / "plans" / f"{row['record']['letters']}.json"
            ) == Plan.from_record(row["record"])
    model = ft.load(
        weights / "predictor.safetensors",
        weights / "refiner.safetensors",
        heads=CONFIG.heads,
        device="cpu",
    )
    labels = [i % 10 for i in range(20)]
    fine, ours = (ft.sample(model, p, labels, seed=0, guidance=1.5) for p in ("C8", best))
    assert float((ours - fine).square().mean().sqrt()) == pytest.approx(least["rms"], rel=1e-4)


@pytest.mark.slow
def test_tuning_is_the_same_again_to_the_last_bit(tuned, weights, tmp_path):
    tune.tune(settings(weights, tmp_path))
    assert (tmp_path / "best.json").read_bytes() == (tuned / "best.json").read_bytes()
    first, second = (
        {k: v for k, v in read(out)["kept"].items() if k[0] in "Ls"} for out in (tuned, tmp_path)
    )
    assert first == second


@pytest.mark.slow
def test_plans_are_found_without_the_noise_and_classes_they_are_measured_on(
    tuned, weights, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        rng,
        "noise",
        lambda shape, seed, numbers, real=rng.noise: (
            drawn.append(list(numbers)) or real(shape, seed, numbers)
        ),
    )
    other = settings(weights, tmp_path)
    model = ft.load(other.model, other.refiner, heads=CONFIG.heads, device="cpu")
    batches = tune.calibration_batches(other, model, lambda calls: None)
    assert drawn == [[tune.CALIBRATION + i for i in range(12)]]
    assert sum(len(batch.noise) for batch in batches) == 12
    labels = torch.cat([batch.field(Plan.parse("E1")).labels for batch in batches])
    assert set(labels.tolist()) == set(range(8))  # of 10 classes, a fifth is held apart
    cost_model = CostModel(call_costs(model), 2.2)
    keep = Keep(tmp_path / "a.json", {"kept": {}})
    plans = tune.find(replace(other, images=500), model, cost_model, keep, lambda calls: None)
    assert [plan for plan, _ in plans] == [
        Plan.from_record(row["record"])
        for row in read(tuned)["rows"]
        if row["how"] in ("fitted", "searched")
    ]
    assert all(min(numbers) >= tune.CALIBRATION for numbers in drawn)


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(tuned, weights, tmp_path, monkeypatch):
    def killed(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(search, "with_refiner_step", killed)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(settings(weights, tmp_path))
    assert {"searched", "L1"} <= read(tmp_path)["kept"].keys()
    assert not (tmp_path / "best.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(search, "searched", killed)  # not asked again
        tune.tune(settings(weights, tmp_path))
    assert (tmp_path / "best.json").read_bytes() == (tuned / "best.json").read_bytes()


def test_results_of_other_settings_are_not_mixed(tuned, weights, tmp_path):
    with pytest.raises(ValueError, match=r"tuning\.json was made with other settings"):
        tune.tune(settings(weights, tuned, seed=1))
    (tmp_path / "tuning.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results of a search"):
        tune.tune(settings(weights, tmp_path))


@pytest.mark.slow
def test_a_budget_in_milliseconds_is_kept_by_the_measured_costs(weights, tmp_path, monkeypatch):
    costs = {
        **dict.fromkeys("EABCUDLP", 2.0),
        **dict.fromkeys("HX", 4.0),
        **{"R": 1.0, "S": 0.5, "M": 0.5, "fixed": 0.25},
    }
    monkeypatch.setattr(tune, "step_costs", lambda *rest: costs)
    with pytest.raises(
        ValueError, match=r"the budget must allow one predictor call, which costs 2\.25, got 2\.2"
    ):
        tune.tune(settings(weights, tmp_path / "less", budget_calls=None, budget_ms=2.2))
    tune.tune(
        settings(weights, tmp_path / "more", budget_calls=None, budget_ms=2.8, rivals=("E3",))
    )
    rows = read(tmp_path / "more")["rows"]
    assert {row["plan"]: row["price"] for row in rows} == {
        "L1": 2.25,
        "L1M1": 2.75,
        "E1": 2.25,
        "E1S1": 2.75,
        "E3": 6.25,
    }


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(budget_ms=3.0), "give budget_calls or budget_ms, not both"),
        (dict(budget_calls=0), "budget_calls must be above 0"),
        (dict(budget_calls=float("nan")), "budget_calls must be finite"),
        (dict(images=19), "images must be at least 20"),
        (dict(iterations=0), "iterations must be at least 1"),
        (dict(reference_plan="H1R1"), "reference_plan must do without the refiner"),
        (dict(guidance_interval=(0.5, 0.2)), "guidance_interval"),
        (dict(rivals=("R2",)), "R needs the velocity"),
        (dict(seed=-1), "seed must be from 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(options, said, weights, tmp_path):
    with pytest.raises(ValueError, match=said):
        settings(weights, tmp_path, **options)
