"""The two objectives, against their formulas written out from what the networks are called with."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from torch import Tensor

from flowturbo import Plan
from flowturbo.models.flow_model import FlowModel
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.runtime.rng import StepRandom
from flowturbo.sampling.velocity_field import GuidedField
from flowturbo.training.objectives import FlowMatching, Refinement, drop_labels

CLASSES = 10  # also the null class
SHAPE = (4, 4, 4)


def batch(seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64), torch.randint(
        CLASSES, (n,), generator=generator
    )


def curved(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A teacher: no two inputs have one velocity."""
    return (
        torch.sin(x * (1 + 0.2 * y.view(-1, 1, 1, 1)))
        + t.view(-1, 1, 1, 1) * x.flip(1)
        + 0.1 * y.view(-1, 1, 1, 1)
    )


class Recorded:
    """A network that keeps what it was called with and what it gave."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls: list[tuple[Tensor, ...]] = []
        self.results: list[Tensor] = []

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls.append(args)
        self.results.append(self.function(*args))
        return self.results[-1]


def student_of(x: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return 0.3 * torch.cos(x) - 0.2 * v + 0.05 * t.view(-1, 1, 1, 1) * y.view(-1, 1, 1, 1)


def noise_of(x: Tensor, t: Tensor, data: Tensor) -> Tensor:
    """The x0 of which x is the point at t on the path to data."""
    t = t.view(-1, 1, 1, 1)
    return (x - t * data) / (1 - t)


def is_uniform(values: Tensor, low: float, high: float) -> bool:
    """Within [low, high], and nearer to the uniform distribution than Kolmogorov's 2 / sqrt(n), as
    99.9 % of true draws are.
    """
    n = len(values)
    places = (values.double().sort().values - low) / (high - low)
    steps = torch.arange(n, dtype=torch.float64) / n
    gap = torch.maximum((places - steps).abs().max(), (places - steps - 1 / n).abs().max())
    return bool((places >= 0).all()) and bool((places <= 1).all()) and float(gap) < 2 / n**0.5


# Flow matching.


@pytest.mark.parametrize("seed", range(3))
def test_flow_matching_is_its_formula(seed):
    data, y = batch(seed)
    network = Recorded(curved)
    loss = FlowMatching(CLASSES, label_drop=0.5)(network, data, y, StepRandom(seed, 7, range(6)))
    [(x, t, labels)] = network.calls
    x0 = noise_of(x, t, data)
    total = 0.0
    for n in range(6):
        assert labels[n] in (y[n], CLASSES)
        velocity = curved(x[n : n + 1], t[n : n + 1], labels[n : n + 1])[0]
        total += float(((velocity - (data[n] - x0[n])) ** 2).sum())
    assert float(loss) == pytest.approx(total / data.numel(), rel=1e-9)


def test_the_true_velocity_has_no_loss():
    data, y = batch(1)

    def truth(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (data - x) / (1 - t.view(-1, 1, 1, 1))

    assert float(FlowMatching(CLASSES)(truth, data, y, StepRandom(0, 0, range(6)))) < 1e-20
    assert float(
        FlowMatching(CLASSES)(
            lambda *given: truth(*given) + 0.5, data, y, StepRandom(0, 0, range(6))
        )
    ) == pytest.approx(0.25)


def test_noise_is_normal_and_time_uniform():
    data, y = batch(2, n=2000)
    network = Recorded(curved)
    FlowMatching(CLASSES)(network, data, y, StepRandom(3, 1, range(2000)))
    [(x, t, _)] = network.calls
    assert is_uniform(t, 0, 1)
    x0 = noise_of(x, t, data)[t < 0.9]
    assert float(x0.mean()) == pytest.approx(0, abs=4 / x0.numel() ** 0.5)
    assert float(x0.std()) == pytest.approx(1, rel=4 / x0.numel() ** 0.5)
    assert float((x0.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_as_often_as_asked(probability):
    n = 4000
    y = torch.arange(n) % CLASSES
    dropped = drop_labels(y, CLASSES, probability, StepRandom(5, 0, range(n)))
    share = float((dropped == CLASSES).double().mean())
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / n) ** 0.5)
    assert torch.equal(dropped[dropped != CLASSES], y[dropped != CLASSES])


# The refiner's objective.


def refinement(seed: int, n: int = 6, student: Callable[..., Tensor] = student_of, **options):
    """The recorded teacher and student, what they were given, and the loss."""
    data, y = batch(seed, n)
    teacher, refiner = Recorded(curved), Recorded(student)
    objective = Refinement(teacher, CLASSES, guidance_channels=3, **options)
    loss = objective(refiner, data, y, StepRandom(seed, 11, range(n)))
    return teacher, refiner, data, y, loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inside": True},
        {"delta_per_row": True},
        {"drop_before": True},
        dict(inside=True, delta_per_row=True, drop_before=True),
    ],
    ids=str,
)
def test_refinement_is_its_formula(options, seed):
    teacher, student, data, y, loss = refinement(seed, label_drop=0.5, **options)
    (x, t, first_label), (x_later, later, target_label) = teacher.calls
    [(x_student, t_student, student_label, v)] = student.calls
    x0, delta = noise_of(x, t, data), later - t
    # The path and the teacher's velocity on it, with the true label in the public code's form.
    assert_close(x, t.view(-1, 1, 1, 1) * data + (1 - t.view(-1, 1, 1, 1)) * x0, 1e-12)
    assert float(x0.std()) == pytest.approx(1, abs=0.25)
    dropped = target_label
    assert set((dropped != y).nonzero().flatten().tolist()) == set(
        (dropped == CLASSES).nonzero().flatten().tolist()
    )
    assert torch.equal(first_label, dropped if options.get("drop_before") else y)
    # An Euler step of length delta along it; teacher and student look at the same point, time and
    # label, the student at v too.
    moved = torch.stack([x[n] + delta[n] * teacher.results[0][n] for n in range(6)])
    assert_close(x_later, moved, 1e-12)
    assert torch.equal(x_student, x_later)
    assert torch.equal(t_student, later)
    assert torch.equal(student_label, dropped)
    assert torch.equal(v, teacher.results[0])
    # The loss.
    total = sum(
        float(((student.results[0][n] + v[n] - teacher.results[1][n]) ** 2).sum()) for n in range(6)
    )
    assert float(loss) == pytest.approx(total / data.numel(), rel=1e-12)
    # The step's length.
    assert bool((delta > 0).all())
    assert bool((delta <= 0.12).all())
    assert (len({round(d, 12) for d in delta.tolist()}) == 6) == options.get("delta_per_row", False)
    if options.get("inside"):
        assert float(later.max()) <= 1


def times(option: dict[str, bool], batches: int, n: int, **more: float) -> tuple[Tensor, Tensor]:
    """t and delta of many batches, (batches, n)."""
    rows = []
    for step in range(batches):
        teacher = Recorded(lambda x, t, y: x)
        data = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
        objective = Refinement(teacher, CLASSES, 1, **option, **more)
        objective(
            lambda x, t, y, v: v,
            data,
            torch.zeros(n, dtype=torch.int64),
            StepRandom(1, step, range(n)),
        )
        rows.append((teacher.calls[0][1], teacher.calls[1][1]))
    t, later = (torch.stack(part) for part in zip(*rows, strict=True))
    return t, later - t


def test_times_of_the_public_code():
    """t ~ U(0, 1) whatever delta is, one delta ~ U(0, 0.12) a batch, and about 6 % of the rows pass
    1.
    """
    t, delta = times({}, 200, 20)
    assert is_uniform(t.flatten(), 0, 1)
    assert float((delta - delta[:, :1]).abs().max()) < 1e-6
    assert is_uniform(delta[:, 0], 0, 0.12)
    assert float((t + delta > 1).double().mean()) == pytest.approx(0.06, abs=0.02)


@pytest.mark.parametrize("per_row", [False, True])
def test_times_inside(per_row):
    """No row passes 1, and t is uniform on what is left for it."""
    t, delta = times({"inside": True, "delta_per_row": per_row}, 200, 20)
    assert float((t + delta).max()) <= 1
    assert is_uniform((t / (1 - delta)).flatten(), 0, 1 + 1e-6)


def test_a_delta_for_each_row():
    t, delta = times({"delta_per_row": True}, 100, 20)
    assert is_uniform(delta.flatten(), 0, 0.12)
    assert is_uniform(t.flatten(), 0, 1)
    assert float(np.corrcoef(t.flatten(), delta.flatten())[0, 1]) == pytest.approx(0, abs=0.1)
    assert float((t + delta > 1).double().mean()) == pytest.approx(0.06, abs=0.02)


@pytest.mark.parametrize("delta_max", [0.01, 0.5])
def test_delta_has_the_largest_length_asked(delta_max):
    _, delta = times({"delta_per_row": True}, 20, 50, delta_max=delta_max)
    assert is_uniform(delta.flatten(), 0, delta_max)


@pytest.mark.parametrize("guidance", [(1.0, 4.0), (2.5, 2.5)])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_guided_velocity_is_what_the_sampler_would_cache(channels, guidance):
    """Row by row: the field that samples, given this row's x, t, label and scale, caches what the
    refiner is fed in training: the conditional half for a kept label, the unconditional half for a
    dropped one."""
    data, y = batch(8)
    teacher, student = Recorded(curved), Recorded(student_of)
    objective = Refinement(teacher, CLASSES, channels, label_drop=0.5, guidance=guidance)
    objective(student, data, y, StepRandom(9, 0, range(6)))
    (x, t, labels), (x_later, later, dropped) = teacher.calls
    [(x_student, _, _, v)] = student.calls
    assert torch.equal(labels, torch.cat([y, torch.full_like(y, CLASSES)]))
    assert torch.equal(x[:6], x[6:])
    assert torch.equal(t[:6], t[6:])
    assert len(dropped.unique()) > 1
    assert 0 < int((dropped == CLASSES).sum()) < 6
    model = FlowModel(
        predictor=lambda x, t, y, v: curved(x, t, y),
        latent_shape=SHAPE,
        num_classes=CLASSES,
        null_class=CLASSES,
        guidance_channels=channels,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    c, u = teacher.results[0].chunk(2)
    scales = []
    for n in range(6):
        difference = (c - u)[n, 0]
        scales.append(float(((v - u)[n, 0] * difference).sum() / difference.square().sum()))
        field = GuidedField(model, Plan.parse("H1"), y[n : n + 1], scales[-1], channels)
        halves = field.predict(x[n : n + 1], float(t[n]))
        assert_close(v[n], halves[int(dropped[n] == CLASSES)], 1e-12)
        assert_close(
            x_later[n], x[n] + (later[n] - t[n]) * halves[0], 1e-12
        )  # x moves by the conditional half
    low, high = guidance
    assert low - 1e-9 <= min(scales) <= max(scales) <= high + 1e-9
    assert low == high or len({round(s, 9) for s in scales}) == 6
    assert torch.equal(x_student, x_later)


def test_without_guidance_the_teacher_is_asked_once_a_point():
    teacher, *_ = refinement(1, guidance=(1.0, 1.0))
    assert [len(call[0]) for call in teacher.calls] == [6, 6]
    teacher, *_ = refinement(1, guidance=(1.0, 2.0))
    assert [len(call[0]) for call in teacher.calls] == [12, 6]


@pytest.mark.parametrize(
    "options", [{}, {"inside": True, "delta_per_row": True}, {"guidance": (1.5, 3.0)}], ids=str
)
def test_the_perfect_refiner_has_no_loss(options):
    *_, loss = refinement(2, student=lambda x, t, y, v: curved(x, t, y) - v, **options)
    assert float(loss) < 1e-30
    teacher, student, _, _, loss = refinement(
        2, student=lambda x, t, y, v: torch.zeros_like(v), **options
    )
    assert float(loss) == pytest.approx(
        float((student.calls[0][3] - teacher.results[1]).square().mean())
    )
    assert float(loss) > 1e-6


@pytest.mark.parametrize("options", [{}, {"guidance": (1.5, 3.0)}, {"drop_before": True}], ids=str)
def test_gradients_reach_the_student_only(options):
    config = SiTConfig(
        hidden=16, depth=1, heads=2, patch=2, side=4, num_classes=CLASSES, learned_sigma=False
    )
    teacher, student = SiT(config), SiT(config.refiner())
    data, y = (t.float() if t.is_floating_point() else t for t in batch(3))
    data.requires_grad_(True)
    loss = Refinement(teacher, CLASSES, 3, **options)(student, data, y, StepRandom(0, 0, range(6)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is None for p in teacher.parameters())
    assert data.grad is None
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(CLASSES, 0.3),
        Refinement(curved, CLASSES, 3, label_drop=0.3),
        Refinement(
            curved, CLASSES, 3, label_drop=0.3, delta_per_row=True, inside=True, guidance=(1.0, 3.0)
        ),
    ],
    ids=["flow matching", "refinement", "refinement with options"],
)
def test_a_split_batch_has_the_same_loss(objective, world):
    """Rows draw the same numbers in whichever process they are, and all processes one delta."""
    data, y = batch(4)

    def network(x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        return curved(x, t, y) if v is None else student_of(x, t, y, v)

    whole = objective(network, data, y, StepRandom(5, 3, range(6)))
    share = 6 // world
    parts = [slice(k * share, (k + 1) * share) for k in range(world)]
    losses = [
        objective(network, data[p], y[p], StepRandom(5, 3, range(p.start, p.stop))) for p in parts
    ]
    assert_close(torch.stack(losses).mean(), whole, 1e-14)
    assert len({float(loss) for loss in losses}) == world
    other = objective(network, data, y, StepRandom(5, 4, range(6)))
    assert relative_error(other, whole) > 1e-3


def test_options_do_not_change_the_other_draws():
    """So that two runs that differ in an option can be compared: same t, noise and labels."""
    plain = refinement(6, label_drop=0.5)
    for options in ({"drop_before": True}, {"delta_per_row": True}):
        other = refinement(6, label_drop=0.5, **options)
        assert torch.equal(plain[0].calls[0][0], other[0].calls[0][0])
        assert torch.equal(plain[0].calls[0][1], other[0].calls[0][1])
        assert torch.equal(plain[0].calls[1][2], other[0].calls[1][2])


def test_objectives_are_values():
    assert FlowMatching(10) == FlowMatching(10, 0.1)
    assert replace(Refinement(curved, 10, 3), inside=True) != Refinement(curved, 10, 3)


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.0, 2.0)], ids=str)
def test_a_refiner_s_loss_is_wide_where_networks_are_narrow(guidance):
    """Under autocast networks return bfloat16. Their small differences are taken in float32."""

    def narrow(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: function(*args).to(torch.bfloat16)

    data, y = (v.float() if v.is_floating_point() else v for v in batch(3))
    refinement = Refinement(narrow(curved), CLASSES, SHAPE[0], guidance=guidance)
    seen: list[Tensor] = []

    def student(x: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        seen.append(v)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    loss = refinement(student, data, y, StepRandom(0, 0, range(len(data))))
    assert loss.dtype == seen[0].dtype == torch.float32
