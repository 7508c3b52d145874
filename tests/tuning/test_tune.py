"""Plans with weights of their own: the steps, their files, the fit, and the search that keeps to
its budget and its noise.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from fake_recorder import LABELS, captured_model
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from tiny import CONFIG, random_sit, tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo import Plan
from flowturbo.cli.main import main
from flowturbo.models.checkpoint import save_sit
from flowturbo.runtime import rng
from flowturbo.sampling.run import Job
from flowturbo.solver.plan import shifted_grid
from flowturbo.solver.steps import (
    MAX_PAST,
    STEPS,
    Field,
    PastVelocity,
    State,
    adams_bashforth_weights,
)
from flowturbo.tuning import cost as cost_model
from flowturbo.tuning import fit, search, tune
from flowturbo.tuning.cost import CostModel, call_costs, step_costs
from flowturbo.tuning.fit import Batch
from flowturbo.tuning.report import against

sys.path.insert(0, str(ROOT / "bench"))


class Mixture(Field):
    """The exact velocity from normal noise (t = 0) to a mixture of normal distributions of this
    width; an exact refiner.
    """

    def __init__(self, centres: Tensor, width: float) -> None:
        self.centres, self.width = centres, width

    def predict(self, x: Tensor, t: float) -> Tensor:
        away = x[:, None] - t * self.centres
        variance = (1 - t) ** 2 + (t * self.width) ** 2
        share = torch.softmax(-away.square().sum(dim=-1) / (2 * variance), dim=1)
        toward = self.centres + (t * self.width**2 - (1 - t)) / variance * away
        return (share[..., None] * toward).sum(dim=1)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        return self.predict(x, t) - v


FIELD = Mixture(
    torch.tensor(
        [[2.0, 0.5, -1.0], [-1.5, 1.0, 1.0], [0.3, -2.0, 0.4], [-0.5, -0.5, 2.0]]
    ).double(),
    0.6,
)


def run(plan: Plan, field: Field, x: Tensor) -> Tensor:
    state = State(x)
    for step, t0, t1 in plan.schedule():
        state = step(field, state, t0, t1)
    return state.x


def images(seed: int, count: int) -> Batch:
    noise = rng.noise((3,), seed, range(count)).double()
    return Batch(lambda plan: FIELD, noise, run(Plan.parse("C300"), FIELD, noise))


CALIBRATION, TEST = images(1, 128), images(2, 512)

some_weights = st.floats(-2, 2, allow_nan=False)


def random_plan(letters: str, seed: int) -> Plan:
    """A plan whose fitted steps use every velocity there is, by random weights."""
    generator = np.random.default_rng(seed)
    grid = (0.0, *np.sort(generator.uniform(0.05, 0.95, len(letters) - 1)).tolist(), 1.0)
    return Plan(
        letters,
        grid,
        weights=tuple(tuple(generator.normal(0, 0.3, i + 1).tolist()) for i in range(len(letters))),
    )


# Steps


def test_without_weights_a_fitted_step_is_adams_bashforth_of_order_4():
    model = tiny_model()
    assert ft.sample(model, "L6", [1, 2], seed=0, guidance=1.5).equal(
        ft.sample(model, "C6", [1, 2], seed=0, guidance=1.5)
    )
    x = TEST.noise[:4]
    assert_close(
        run(Plan.parse("L1M5"), FIELD, x), run(Plan.parse("C6"), FIELD, x), 1e-14
    )  # with an exact refiner


@pytest.mark.parametrize("letter, order", [("E", 1), ("A", 2), ("B", 3), ("C", 4)])
def test_weights_of_adams_bashforth_make_its_steps(letter, order):
    grid = shifted_grid(6, 1.7)
    plan = fit.weighted(Plan("L" * 6, grid), order)
    assert_close(
        run(plan, FIELD, TEST.noise), run(Plan(letter * 6, grid), FIELD, TEST.noise), 1e-14
    )


@pytest.mark.parametrize(
    "letter, length", [(letter, n) for letter in "LM" for n in (1, 2, 4, 5, 6, 9, MAX_PAST + 1)]
)
def test_a_fitted_step_is_the_weighted_sum_of_an_independent_formula(letter, length):
    generator = np.random.default_rng(length)
    x, past = generator.normal(size=(2, 3)), generator.normal(size=(MAX_PAST, 4, 3))
    weights = generator.normal(size=length).tolist()

    class Guided(Field):
        def predict(self, x: Tensor, t: float) -> Tensor:
            return torch.cat([torch.tanh(x + t), torch.sin(x - t)])

        def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
            return torch.cat([x, x]) * 0.3 + v * t

    both = np.concatenate([np.tanh(x + 0.3), np.sin(x - 0.3)])
    if letter == "M":
        both = past[-1] + (np.concatenate([x, x]) * 0.3 + past[-1] * 0.3)
    expected = x.copy()
    for weight, v in zip(weights, [both, *past[::-1]], strict=False):
        expected = expected + weight * v[:2]  # x moves by the conditional half
    samples = tuple(PastVelocity(0.01 * i, torch.from_numpy(v)) for i, v in enumerate(past))
    after = STEPS[letter].weighted(tuple(weights))(
        Guided(), State(torch.from_numpy(x), None, samples), 0.3, 0.7
    )
    assert_close(after.x, torch.from_numpy(expected), 1e-14)
    assert_close(after.past[-1].v, torch.from_numpy(both), 1e-14)
    assert (after.v, after.past[-1].t, len(after.past)) == (None, 0.3, MAX_PAST)


def test_sampling_uses_the_weights_with_both_halves_and_the_refiner():
    """Against the steps written out, on the model's networks."""
    model, guidance = tiny_model(dtype=torch.float64), 1.7
    plan = random_plan("LMLLMLM", 3)
    noise, labels = rng.noise(model.latent_shape, 5, range(3)).double(), torch.tensor(LABELS)
    both_labels = torch.cat([labels, torch.full_like(labels, model.null_class)])

    def call(network, x: Tensor, t: float, *v: Tensor) -> Tensor:
        both = network(torch.cat([x, x]), torch.full((6,), t, dtype=torch.float64), both_labels, *v)
        c, u = both.chunk(2)
        guided = u[:, :3] + guidance * (c[:, :3] - u[:, :3])
        return torch.cat([torch.cat([guided, c[:, 3:]], 1), torch.cat([guided, u[:, 3:]], 1)])

    x, velocities = noise, []
    for letter, t, weights in zip(plan.letters, plan.grid, plan.weights, strict=False):
        if letter == "L":
            velocities.append(call(model.predictor, x, t))
        else:
            velocities.append(velocities[-1] + call(model.refiner, x, t, velocities[-1]))
        x = x + sum(w * v[:3] for w, v in zip(weights, velocities[::-1], strict=True))
    assert_close(ft.sample(model, plan, labels, noise=noise, guidance=guidance), x, 1e-12)


# Plans


@pytest.mark.parametrize(
    "letters, weights, said",
    [
        (
            "LL",
            ((0.5,),),
            "weights must be given for each of the 2 steps of L and M, or for none, got 1",
        ),
        ("LE", ((0.5,), (0.5,)), "weights must be given for each of the 1 steps"),
        ("LL", ((0.5,), ()), r"weights\[1\] must be 1 to 16 finite numbers"),
        ("LL", ((0.5,), (0.5, float("nan"))), r"weights\[1\] must be 1 to 16 finite numbers"),
        ("LL", ((0.5, 0.1), (0.5,)), "L has weights of 1 earlier velocities, but there are 0"),
        ("M", ((0.5,),), "M needs the velocity of an earlier step"),
        ("L" * 17, ((0.1,),) * 16 + ((0.1,) * 17,), r"weights\[16\] must be 1 to 16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_place(letters, weights, said):
    with pytest.raises(ValueError, match=said):
        Plan(letters, shifted_grid(len(letters)), weights=weights)


@pytest.mark.parametrize("weights", [3, "0.5", (0.5,), (("a",),), ((True,),)])
def test_weights_that_are_no_numbers_are_refused_by_name(weights):
    with pytest.raises(TypeError, match="weights"):
        Plan("L", (0, 1), weights=weights)


def test_weights_are_part_of_the_plan_and_of_what_captures_are_kept_under():
    plan = random_plan("LLM", 0)
    same = Plan(plan.letters, plan.grid, weights=[list(row) for row in plan.weights])
    other = replace(
        plan, weights=(*plan.weights[:-1], (*plan.weights[-1][:-1], plan.weights[-1][-1] + 1e-12))
    )
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan != other
    assert str(plan) == str(other) == "L2M1"
    jobs = {
        Job.of(tiny_model(), p, 1.5, None, "latents", torch.float32) for p in (plan, same, other)
    }
    assert len(jobs) == 2
    model, recorder = captured_model()
    first, second = (
        [ft.sample(model, p, LABELS, seed=0, guidance=1.5) for _ in range(3)]
        for p in (plan, random_plan("LLM", 1))
    )
    assert recorder.recorded == 2
    assert first[0].equal(first[2])
    assert second[0].equal(second[2])
    assert relative_error(second[0], first[0]) > 1e-3


def test_a_plan_that_starts_later_moves_as_much_less():
    plan = random_plan("LLM", 0)
    later = plan.starting_at(0.25)
    assert_close(
        torch.tensor(sum(later.weights, ())), 0.75 * torch.tensor(sum(plan.weights, ())), 1e-7
    )
    x = TEST.noise[:3]
    constant = Mixture(torch.tensor([[1.0, 2.0, 3.0]]).double(), 1.0)
    constant.predict = lambda x, t: torch.ones_like(x)
    assert_close(run(later, constant, x) - x, 0.75 * (run(plan, constant, x) - x), 1e-12)


# Files


@given(st.text(alphabet="LMEA", min_size=1, max_size=9), st.data())
def test_a_plan_comes_back_from_its_file_to_the_last_bit(tmp_path_factory, letters, data):
    letters = "L" + letters
    rows = tuple(
        tuple(data.draw(st.lists(some_weights, min_size=1, max_size=i + 1)))
        for i, letter in enumerate(letters)
        if letter in "LM"
    )
    plan = Plan(
        letters,
        shifted_grid(len(letters), data.draw(st.floats(0.3, 3))),
        (0.125, 0.75),
        weights=rows,
    )
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path, {"of": "a test"})
    assert Plan.load(path) == plan


def altered(**entries: object) -> str:
    good = {
        "format": "flowturbo plan 1",
        "plan": "L1",
        "grid": [0, 1],
        "guidance_interval": [0, 1],
        "weights": [[1]],
        "about": {},
    }
    return json.dumps({k: v for k, v in {**good, **entries}.items() if v is not ...})


HOSTILE = {
    "nothing": (b"", "no plan file"),
    "no JSON": (b"H1P5R3", "no plan file"),
    "bytes": (bytes(range(256)), "no plan file"),
    "a list": (b"[1, 2]", "its format must be"),
    "another format": (altered(format="flowturbo plan 2"), "its format must be 'flowturbo plan 1'"),
    "an entry less": (altered(grid=...), "it must hold format, plan, grid"),
    "an entry more": (altered(run="rm -rf"), "'run'"),
    "an entry twice": (altered()[:-1] + ', "plan": "L1"}', "'plan' stands there twice"),
    "not a number": (altered(weights=[[float("nan")]]), "NaN is no number"),
    "infinity": (altered(grid=[0, float("inf")]), "Infinity is no number"),
    "too large a number": (altered().replace("[[1]]", "[[1e999]]"), "finite numbers"),
    "a huge whole number": (altered().replace("[[1]]", f"[[{'9' * 400}]]"), "no plan file"),
    "text for numbers": (altered(weights="0.5"), "weights must be a list, got str"),
    "text in numbers": (altered(weights=[["0.5"]]), r"weights[0] must be a list of numbers"),
    "a bool for a weight": (altered(weights=[[True]]), r"weights[0] must be a list of numbers"),
    "a number for letters": (altered(plan=3), "plan must be a str, got int"),
    "unknown letters": (altered(plan="Q1"), "plan must look like 'H1P5R3'"),
    "a file's name for letters": (altered(plan="other.json"), "plan must look like 'H1P5R3'"),
    "a grid that falls": (
        altered(plan="L2", grid=[0, 1, 0.5], weights=[]),
        "grid must rise strictly",
    ),
    "a grid too short": (altered(grid=[0]), "grid must hold 2 times"),
    "weights of no step": (
        altered(weights=[[1], [1]]),
        "weights must be given for each of the 1 steps",
    ),
    "too many weights": (altered(weights=[[1, 1]]), "L has weights of 1 earlier velocities"),
    "deep nesting": ("[" * 100_000, "no plan file"),
    "too many bytes": (altered() + " " * (1 << 20), "more than 1048576 bytes"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_holds_no_plan_is_refused_by_name(what, tmp_path, capsys):
    content, said = HOSTILE[what]
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"is no plan file|can.t be read") as refusal:
        Plan.load(path)
    assert str(path) in str(refusal.value)
    assert said in str(refusal.value)
    assert main(["sample", "--plan", str(path), "--out", str(tmp_path / "a.png")]) == 2
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_a_file_that_is_not_there_and_names_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json can't be read: No such file"):
        Plan.load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="can't be read"):
        Plan.load(tmp_path)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        Plan.parse("H1").save(tmp_path / "plan.txt")
    with pytest.raises(ValueError, match="must start at 0 to be saved"):
        Plan.parse("H1").starting_at(0.5).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_sample_takes_a_plans_file_and_no_other_grid_beside_it(tmp_path, capsys):
    plan = random_plan("LML", 2)
    path, out = tmp_path / "best.json", tmp_path / "a.npz"
    plan.save(path)
    assert main(["sample", "--plan", str(path), "--out", str(out), "--num", "3"]) == 0
    assert "3 images by L1M1L1 (2 predictor and 1 refiner calls)" in capsys.readouterr().out
    model = ft.load("digits")
    expected = ft.sample(model, plan, [0, 1, 2], guidance=1.5, seed=0, output="uint8")
    with np.load(out) as arrays:
        assert np.array_equal(arrays["arr_0"], expected.numpy())
    assert ft.sample(model, str(path), [0, 1, 2], guidance=1.5, seed=0, output="uint8").equal(
        expected
    )
    for flags in (
        ["--shift", "2"],
        ["--grid", "0", "0.3", "0.6", "1"],
        ["--guidance-interval", "0.1", "1"],
    ):
        assert main(["sample", "--plan", str(path), "--out", str(out), *flags]) == 2
        assert "a plan's file holds its grid and guidance interval" in capsys.readouterr().err


def test_a_pipelines_scheduler_keeps_the_grid_that_weights_were_fitted_on():
    scheduler = pytest.importorskip("flowturbo.integrations.scheduler")
    plan = fit.weighted(Plan.parse("L4"), 2)  # on a uniform grid
    made = scheduler.PlanScheduler(plan)
    assert made.grid == "plan"
    with pytest.raises(ValueError, match="grid must be 'plan' for a plan with fitted weights"):
        scheduler.PlanScheduler(plan, grid="pipeline")
    made.set_timesteps(4)
    x = start = TEST.noise[:2].float()
    for i, t in enumerate(made.timesteps):
        x = made.step(-FIELD.predict(x, plan.grid[i]), t, x, return_dict=False)[0]
    assert_close(x, run(plan, FIELD, start), 1e-5)


# The fit


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_fitted_plan_beats_adams_bashforth_on_noise_it_never_saw(steps):
    plan = fit.fit_weights(fit.weighted(Plan.parse(f"L{steps}"), 2), [CALIBRATION])
    published = [fit.rms_error(Plan.parse(f"{letter}{steps}"), [TEST]) for letter in "EABC"]
    assert fit.rms_error(plan, [TEST]) < 0.75 * min(published)


def test_times_alone_are_fitted_for_steps_without_weights():
    plan = fit.fit_weights(Plan.parse("H1P2"), [CALIBRATION])
    assert plan.letters == "HPP"
    assert not plan.weights
    assert fit.rms_error(plan, [TEST]) < 0.95 * fit.rms_error(Plan.parse("H1P2"), [TEST])


@pytest.mark.parametrize(
    "plan", [Plan.parse("H1P1"), fit.weighted(Plan.parse("L3"), 3), random_plan("LML", 1)]
)
def test_a_fit_never_gets_worse_and_keeps_letters_cost_and_order_of_times(plan):
    found = fit.fit_weights(plan, [CALIBRATION], iterations=3)
    assert fit.rms_error(found, [CALIBRATION]) <= fit.rms_error(plan, [CALIBRATION])
    assert (found.letters, found.cost) == (plan.letters, plan.cost)
    assert all(a < b for a, b in itertools.pairwise(found.grid))


def test_derivatives_are_those_of_autograd():
    """By each inner time and weight of L steps written out in torch."""
    plan = fit.fit_weights(fit.weighted(Plan.parse("L4"), 2), [CALIBRATION], iterations=1)

    def end(times: Tensor, *rows: Tensor) -> Tensor:
        x, velocities = CALIBRATION.noise[:7], []
        for t, row in zip([torch.zeros(()), *times], rows, strict=True):
            velocities.insert(0, FIELD.predict(x, t))
            x = x + sum(w * v for w, v in zip(row, velocities, strict=True))
        return x

    rows = [torch.tensor(row).double() for row in plan.weights]
    expected = torch.autograd.functional.jacobian(
        end, (torch.tensor(plan.grid[1:-1]).double(), *rows)
    )
    batch = Batch(CALIBRATION.field, CALIBRATION.noise[:7], CALIBRATION.fine[:7])
    states = fit._states(plan, batch)
    found = torch.stack(fit._derivatives(plan, batch, states, lambda calls: None), dim=-1)
    assert_close(found, torch.cat([e.double() for e in expected], dim=-1), 0.02)


def test_a_call_that_was_inserted_changes_nothing_until_it_is_fitted():
    plan = fit.fit_weights(fit.weighted(Plan.parse("L3"), 2), [CALIBRATION], iterations=2)
    for at, letter in itertools.product(range(1, 4), "LM"):
        longer = fit.inserted(plan, at, letter)
        assert len(longer) == 4
        assert longer.letters[at] == letter
        assert_close(run(longer, FIELD, TEST.noise), run(plan, FIELD, TEST.noise), 1e-14)
        assert fit.rms_error(
            fit.fit_weights(longer, [CALIBRATION], iterations=2), [CALIBRATION]
        ) < fit.rms_error(plan, [CALIBRATION])


def test_a_plan_that_diverges_has_an_infinite_error():
    assert fit.rms_error(Plan("LL", (0, 0.5, 1), weights=((1e200,), (1e200, 0))), [TEST]) == float(
        "inf"
    )


# The search


@pytest.mark.parametrize("budget", [0.4, 1.0, 2.3, 3.0])
def test_every_plan_that_is_tried_keeps_to_the_budget(budget):
    model = tiny_model()
    cost_model = CostModel(call_costs(model), budget)
    tried = search.affordable(cost_model, True, [(0.0, 1.0), (0.2, 0.8)]) + tune.published(
        cost_model, True
    )
    share = model.macs[1] / model.macs[0]
    for plan in tried:
        cost = plan.cost
        halves = (
            cost.guided_predictor + cost.predictor + share * (cost.guided_refiner + cost.refiner)
        )
        assert halves / 2 <= budget + 1e-6, plan
    assert bool(tried) == (budget >= 1)
    letters = [plan.letters for plan in search.affordable(cost_model, True, [(0.0, 1.0)])]
    assert len(letters) == len(set(letters))


def test_prices_are_those_of_the_calls_that_a_plan_makes():
    cost_model = CostModel({"E": 1.0, "P": 1.0, "H": 2.0, "R": 0.25}, 10.0, fixed=0.5)
    for text, calls in (("E3", 3), ("P3", 4), ("H1P2", 4), ("H1P2R2", 4.5)):
        assert cost_model.of(Plan.parse(text)) == pytest.approx(0.5 + calls)
    half = Plan.parse("E4", guidance_interval=(0.4, 1.0))  # calls at 0, 1/4, 1/2, 3/4
    assert cost_model.of(half) == pytest.approx(0.5 + 3)


def test_step_costs_are_told_for_each_kind_of_step():
    costs = step_costs(tiny_model(), 1.5, 4, True)
    assert costs.keys() == {"E", "H", "P", "A", "B", "C", "L", "R", "S", "M", "fixed"}
    assert all(cost >= 0 for cost in costs.values())
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

    def seconds(run, device, real=cost_model.seconds):
        real(run, device)
        return next(passed)

    monkeypatch.setattr(cost_model, "seconds", seconds)
    found = cost_model.milliseconds(model, plans, 1.5, 3, turns=3, advance=calls.append)
    assert recorder.recorded == len(plans)
    assert model.captures.limit == 2
    assert sum(calls) == 3 * (1 + 2 + 2 + 3) * (2 + 3)
    assert found == [1e3 * second / 3 for second in (9, 5, 7, 6)]


def test_a_verdict_asks_for_two_standard_errors():
    def row(cost_model: float, rms: float, spread: float) -> dict:
        return {
            "price": cost_model,
            "ms_per_image": 10 - cost_model,
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
    """Files of a tiny model and its refiner."""
    folder = tmp_path_factory.mktemp("weights")
    for name, config, seed in (("predictor", CONFIG, 0), ("refiner", CONFIG.refiner(), 1)):
        save_sit(folder / f"{name}.safetensors", random_sit(config, seed))
    return folder


def settings(weights: Path, out: Path, **options: object) -> tune.Tune:
    given = dict(
        budget_calls=2.2,
        images=20,
        calibration_images=12,
        batch_size=6,
        reference_plan="C8",
        refiner_steps=1,
    )
    return tune.Tune(
        out=out,
        model=str(weights / "predictor.safetensors"),
        refiner=str(weights / "refiner.safetensors"),
        heads=CONFIG.heads,
        device="cpu",
        **{**given, "iterations": 2, **options},
    )


@pytest.fixture(scope="module")
def tuned(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    tune.tune(settings(weights, out))
    return out


def read(out: Path) -> dict:
    return json.loads((out / "tuning.json").read_text())


def test_tune_writes_table_figures_plot_and_the_best_plan(tuned, weights):
    results = read(tuned)
    table = (tuned / "tuning.md").read_text()
    assert (tuned / "tuning.png").read_bytes()[1:4] == b"PNG"
    found = [row for row in results["rows"] if row["how"] in ("fitted", "searched")]
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
    least = min(found, key=lambda row: row["calibration_rms"])
    assert best == tune.plan_from(least["record"])
    assert all(row["price"] <= 2.2 + 1e-9 for row in results["rows"])
    for row in results["rows"]:
        if row["how"] == "fitted":
            assert Plan.load(
                tuned / "plans" / f"{row['record']['letters']}.json"
            ) == tune.plan_from(row["record"])
    model = ft.load(
        weights / "predictor.safetensors",
        weights / "refiner.safetensors",
        heads=CONFIG.heads,
        device="cpu",
    )
    labels = [i % 10 for i in range(20)]
    fine, ours = (ft.sample(model, p, labels, seed=0, guidance=1.5) for p in ("C8", best))
    assert float((ours - fine).square().mean().sqrt()) == pytest.approx(least["rms"], rel=1e-4)


def test_tuning_is_the_same_again_to_the_last_bit(tuned, weights, tmp_path):
    tune.tune(settings(weights, tmp_path))
    assert (tmp_path / "best.json").read_bytes() == (tuned / "best.json").read_bytes()
    first, second = (
        {k: v for k, v in read(out)["kept"].items() if k[0] in "Ls"} for out in (tuned, tmp_path)
    )
    assert first == second


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
    asked = torch.cat([batch.field(Plan.parse("E1")).labels for batch in batches])
    assert set(asked.tolist()) == set(range(8))  # of 10 classes, a fifth is held apart
    cost_model = CostModel(call_costs(model), 2.2)
    keep = tune.Keep(tmp_path / "a.json", {"kept": {}})
    found = tune.find(replace(other, images=500), model, cost_model, keep, lambda calls: None)
    assert [tune.record(plan) for plan, _ in found] == [
        tune.record(tune.plan_from(row["record"]))
        for row in read(tuned)["rows"]
        if row["how"] in ("fitted", "searched")
    ]
    assert all(min(numbers) >= tune.CALIBRATION for numbers in drawn)


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
    with pytest.raises(ValueError, match="belongs to a search with other settings"):
        tune.tune(settings(weights, tuned, seed=1))
    (tmp_path / "tuning.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results of a search"):
        tune.tune(settings(weights, tmp_path))


def test_a_budget_in_milliseconds_is_kept_by_the_measured_costs(weights, tmp_path, monkeypatch):
    costs = {**dict.fromkeys("EABCLP", 2.0), "H": 4.0, "R": 1.0, "S": 0.5, "M": 0.5, "fixed": 0.25}
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


def test_solvers_of_diffusers_become_plans_that_do_the_same():
    solvers = pytest.importorskip("solvers")
    noise = TEST.noise[:5, :, None, None]

    def velocity(x: Tensor, t: float) -> Tensor:
        return FIELD.predict(x[:, :, 0, 0], float(t))[:, :, None, None]

    for name, make in solvers.SOLVERS.items():
        for steps, shift in ((2, 1.0), (5, 2.0)):
            plan = solvers.plan_of(make(shift), steps)
            expected = solvers.run(
                make(shift), steps, noise, lambda x, k, plan=plan: velocity(x, plan.grid[k])
            )
            assert_close(ft.sample(velocity, plan, noise=noise), expected, 1e-3)
            assert len(plan) == plan.cost.predictor == steps, name


def test_adams_bashforth_weights_stay_what_plans_start_from():
    plan = fit.weighted(Plan("LLL", (0.0, 0.2, 0.6, 1.0)), 2)
    assert plan.weights[2] == (*reversed(adams_bashforth_weights([0.2, 0.6], 0.6, 1.0)), 0.0)
