"""A refiner trained at the states where plans call it."""

import hashlib
from dataclasses import replace

import named_model
import pytest
import torch
from close import assert_close
from torch import Tensor
from training_runs import contents, same_bits, tiny, tiny_refiner

import flowturbo as ft
from flowturbo import Plan
from flowturbo.models.checkpoint import convert, load_sit
from flowturbo.models.flow_model import FlowModel
from flowturbo.models.notes import Notes
from flowturbo.runtime.rng import StepRandom
from flowturbo.training.plan_refinement import PlanRefinement
from flowturbo.training.settings import plain
from flowturbo.training.train import distill, train

CLASSES, SHAPE, N = 3, (2, 4, 4), 5


def teacher(x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
    """No two inputs have one velocity."""
    t, y = (k.view(-1, 1, 1, 1) for k in (t, y))
    return torch.sin(x * (1 + 0.2 * y)) + t * x.flip(1) + 0.1 * y


def student(x: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return 0.3 * torch.cos(x) - 0.2 * v + 0.05 * (t * y).view(-1, 1, 1, 1)


def model() -> FlowModel:
    return FlowModel(
        teacher, SHAPE, CLASSES, CLASSES, SHAPE[0], torch.device("cpu"), torch.float64
    )  # fmt: skip


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.5, 2.5)], ids=str)
@pytest.mark.parametrize("text", ["H1P1R2", "H1S2", "A2R1"])
def test_the_loss_is_of_the_calls_that_sampling_makes(text, guidance):
    """Sampled from the same noise, the refiner is called with the same; the loss written out."""
    calls: list[tuple[Tensor, ...]] = []

    def recorded(x: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        calls.append((x.clone(), t.clone(), y.clone(), v.clone()))
        return student(x, t, y, v)

    plan = Plan.parse(text)
    objective = PlanRefinement(model(), (plan,), guidance, SHAPE[0], label_drop=0.0)
    labels = torch.tensor([0, 1, 2, 1, 0])
    loss = objective(
        recorded, torch.zeros(N, *SHAPE, dtype=torch.float64), labels, StepRandom(7, 3, range(N))
    )
    *alone, joined = calls
    assert len(alone) == plan.cost.refiner
    for part, whole in zip(zip(*alone, strict=True), joined, strict=True):
        assert_close(torch.cat(part), whole, 1e-12)
    calls.clear()
    noise = StepRandom(7, 3, range(N)).normal(SHAPE).double()
    ft.sample(
        replace(model(), refiner=recorded), plan, labels.tolist(), noise=noise, guidance=guidance[0]
    )
    for ours, sampled in zip(alone, calls, strict=True):
        for a, b in zip(ours, sampled, strict=True):
            assert_close(a.double(), b.double(), 1e-6)
    squares = []
    for k, (x, t, y, v) in enumerate(alone):
        base = v
        if "R" in text and k % 2:  # R's second offset is added to its first refined velocity
            first = student(*alone[k - 1])
            if guidance[0] > 1:
                conditional, null = first.chunk(2)
                first = (null + guidance[0] * (conditional - null)).repeat(2, 1, 1, 1)
            base = v + first
        squares.append((student(x, t, y, v) + base - teacher(x, t, y)).square())
    assert_close(loss, torch.cat(squares).mean(), 1e-6)


def test_a_perfect_refiner_has_no_loss():
    def perfect(x: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return teacher(x, t, y) - v

    objective = PlanRefinement(model(), (Plan.parse("H1S3"),), (1.0, 4.0), SHAPE[0])
    y, draws = torch.tensor([0, 1, 2, 1, 0]), StepRandom(0, 0, range(N))
    assert float(objective(perfect, torch.zeros(N, *SHAPE).double(), y, draws)) < 1e-24


def test_all_plans_are_drawn_alike_in_every_process():
    plans = tuple(map(Plan.parse, ("H1R1", "H1P1R1")))
    objective = PlanRefinement(model(), plans, (1.0, 1.0), SHAPE[0])
    counts = [0, 0]
    for step in range(60):
        rows = []
        for share in (range(2), range(2, 5)):
            seen: list[int] = []

            def counting(x: Tensor, t: Tensor, y: Tensor, v: Tensor, seen=seen) -> Tensor:
                seen.append(round(float(t[-1]) * 6))
                return student(x, t, y, v)

            y = torch.zeros(len(share), dtype=torch.int64)
            draws = StepRandom(1, step, share)
            objective(counting, torch.zeros(len(share), *SHAPE).double(), y, draws)
            rows.append(seen)
        assert rows[0] == rows[1]
        counts[rows[0][0] == 4] += 1
    assert min(counts) > 15


def test_a_refiner_of_plans_end_to_end(tmp_path, data):
    predictor = train(tiny(tmp_path / "teacher", data, steps=60, lr=5e-3, hidden=32, depth=2))
    options = dict(plans=("H1P1R2", "A2R1"), guidance=(1.0, 3.0))
    distill(tiny_refiner(tmp_path / "one", data, predictor, **options))
    for steps in (3, 12):
        distill(tiny_refiner(tmp_path / "two", data, predictor, steps=steps, **options))
    assert same_bits(contents(tmp_path / "one"), contents(tmp_path / "two"))
    described = load_sit(tmp_path / "one" / "model.safetensors", "refiner").provenance
    assert described["settings"]["plans"] == ["H1P1R2", "A2R1"]


@pytest.mark.parametrize("options", [{}, {"plans": ("H1R1",)}], ids=str)
def test_a_refiner_of_two_sizes(tmp_path, data, options):
    predictor = train(tiny(tmp_path / "teacher", data, steps=4, sides=(2,), sides_share=0.5))
    path = distill(
        tiny_refiner(tmp_path / "refiner", data, predictor, sides=(2,), sides_share=0.5, **options)
    )
    assert load_sit(path, "refiner").model.config.sides == (2,)
    with pytest.raises(ValueError, match="sides must be divisors of the data's side 4, got 3"):
        distill(tiny_refiner(tmp_path / "other", data, predictor, sides=(3,)))
    alone = train(tiny(tmp_path / "alone", data, steps=1))
    with pytest.raises(ValueError, match=r"sides must be of those that the teacher .* 4, got 2"):
        distill(tiny_refiner(tmp_path / "other", data, alone, sides=(2,)))
    assert not (tmp_path / "other").exists()


def test_plans_of_the_teachers_file_and_a_changed_plan(tmp_path, data):
    predictor = train(tiny(tmp_path / "teacher", data, steps=1))
    own, planned = (
        {"far": Plan.parse("A2R1"), "near": Plan.parse("H1R1")},
        tmp_path / "p.safetensors",
    )
    convert(predictor, planned, notes=Notes(plans=named_model.contents(tmp_path, own)))
    for name in ("near", "H1R1"):
        distill(tiny_refiner(tmp_path / name, data, planned, plans=(name,), steps=2))
    assert same_bits(contents(tmp_path / "near"), contents(tmp_path / "H1R1"))
    with pytest.raises(ValueError, match=r"The model has plans of its own: far \(A2R1"):
        distill(tiny_refiner(tmp_path / "other", data, planned, plans=("fra",)))
    plan = tmp_path / "own.json"
    own["near"].save(plan)
    run = tiny_refiner(tmp_path / "run", data, predictor, plans=(str(plan),), steps=2)
    distill(run)
    Plan.parse("A2R1").save(plan)
    with pytest.raises(ValueError, match=r"plans was \['own.json \(.*and is now \['own.json \("):
        distill(replace(run, steps=4))


def test_a_resumed_run_takes_no_other_teacher(tmp_path, data):
    predictor = train(tiny(tmp_path / "teacher", data, steps=1))
    planned = tmp_path / "planned.safetensors"

    def convert_with(**plans):
        convert(predictor, planned, notes=Notes(plans=named_model.contents(tmp_path, plans)))

    convert_with(near=Plan.parse("H1R1"))
    run = tiny_refiner(tmp_path / "run", data, planned, plans=("near",), steps=2)
    distill(run)
    convert_with(near=Plan.parse("H1R1"), far=Plan.parse("A2"))
    distill(replace(run, steps=3))
    convert_with(near=Plan.parse("A2R1"))
    with pytest.raises(ValueError, match=r"plans was \['near \(.*and is now \['near \("):
        distill(replace(run, steps=4))
    other = train(tiny(tmp_path / "other", data, steps=2))
    convert(
        other,
        planned,
        notes=Notes(plans=named_model.contents(tmp_path, {"near": Plan.parse("H1R1")})),
    )
    with pytest.raises(ValueError, match=r"teacher was 'planned.* and is now 'planned"):
        distill(replace(run, steps=4))


def test_files_of_plans_are_named_without_their_folders(tmp_path, data):
    path = tmp_path / "private" / "mine.json"
    path.parent.mkdir()
    Plan.parse("H1R1").save(path)
    settings = tiny_refiner(tmp_path / "run", data, tmp_path / "x", plans=(str(path), "A2R1"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert plain(settings)["plans"] == [f"mine.json ({digest[:8]})", "A2R1"]
    with pytest.raises(TypeError, match="plans must be a list of texts, got 'H1R1'"):
        replace(settings, plans="H1R1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plans": ("H1P2",)}, "plans must have refiner steps, got H1P2"),
        ({"plans": ("H1Q2",)}, "Q"),
        ({"plans": ("H1R1",), "inside": True}, "plans say at which times.*leave out inside"),
        (
            {"plans": ("H1R1",), "delta_max": 0.2, "drop_before": True},
            "leave out delta_max and drop_before, got 0.2, True",
        ),
    ],
    ids=str,
)
def test_plans_that_do_not_fit_a_refiner_s_training(tmp_path, data, change, message):
    predictor = train(tiny(tmp_path / "teacher", data, steps=1))
    with pytest.raises(ValueError, match=message):
        distill(tiny_refiner(tmp_path / "run", data, predictor, **change))
    assert not (tmp_path / "run").exists()
