"""Plans with weights of their own: the steps they make, and their files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from fake_recorder import LABELS, captured_model
from hypothesis import given
from hypothesis import strategies as st
from mixture import FIELD, TEST, Mixture, random_plan, run, some_weights
from tiny import tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo import Plan
from flowturbo.cli.main import main
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
from flowturbo.tuning import fit


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
    assert (
        main(["sample", "--model", "digits", "--plan", str(path), "--out", str(tmp_path / "a.png")])
        == 2
    )
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
    assert (
        main(["sample", "--model", "digits", "--plan", str(path), "--out", str(out), "--num", "3"])
        == 0
    )
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
        assert (
            main(["sample", "--model", "digits", "--plan", str(path), "--out", str(out), *flags])
            == 2
        )
        assert "a plan's file holds its grid and guidance interval" in capsys.readouterr().err


def test_a_pipelines_scheduler_keeps_the_grid_that_weights_were_fitted_on():
    scheduler = pytest.importorskip("flowturbo.integrations.scheduler")
    plan = fit.weighted(Plan.parse("L4"), 2)  # on a uniform grid
    pipeline_scheduler = scheduler.PlanScheduler(plan)
    assert pipeline_scheduler.grid == "plan"
    with pytest.raises(ValueError, match="grid must be 'plan' for a plan with fitted weights"):
        scheduler.PlanScheduler(plan, grid="pipeline")
    pipeline_scheduler.set_timesteps(4)
    x = start = TEST.noise[:2].float()
    for i, t in enumerate(pipeline_scheduler.timesteps):
        x = pipeline_scheduler.step(-FIELD.predict(x, plan.grid[i]), t, x, return_dict=False)[0]
    assert_close(x, run(plan, FIELD, start), 1e-5)


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
