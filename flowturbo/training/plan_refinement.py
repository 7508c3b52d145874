"""Training a refiner at the states where plans call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.flow_model import FlowModel, Network
from ..runtime.rng import StepRandom
from ..sampling.velocity_field import GuidedField
from ..solver.plan import Plan
from ..solver.state import Move
from ..solver.steps import State
from .objectives import drawn_scale, widened, with_null


@dataclass(frozen=True)
class PlanRefinement:
    """The refiner's objective on the trajectories of plans, instead of the paths to data.

    Section 3.2 of the paper trains on points of those paths, with an Euler step of random length
    between the cached velocity and the refined one. A plan calls the refiner elsewhere: at points
    of its own trajectory from noise, sometimes twice at one time, with a velocity that a refiner
    call before may have made. So here one of the plans is run from noise with the network as it is,
    guided as in sampling. At each refiner call the network learns the offset from the velocity that
    the plan adds it to, to the teacher's unguided velocity there. The data give labels only.

    teacher: the predictor as a model; its own refiner is not used.
    plans: with refiner calls each; ValueError for others.
    guidance: (low, high), the range of the scale, drawn uniformly for each row.
    channels: how many channels guidance acts on.
    label_drop: without guidance, the probability with which a row gets the null class.
    """

    teacher: FlowModel
    plans: tuple[Plan, ...]
    guidance: tuple[float, float]
    channels: int
    label_drop: float = 0.1

    def __post_init__(self) -> None:
        for plan in self.plans:
            if not plan.cost.refiner:
                raise ValueError(f"plans must have refiner steps, got {plan}")

    def __call__(self, network: Network, data: Tensor, y: Tensor, draws: StepRandom) -> Tensor:
        """data (N, C, H, W), for shape and device; y (N,) -> the loss, ()."""
        x = draws.normal(data.shape[1:]).to(data)
        plan = self.plans[int(draws.shared.integers(len(self.plans)))]
        scale: Tensor | None = None
        if self.guidance[1] > 1:
            scale = drawn_scale(self.guidance, data, draws).view(-1, 1, 1, 1)
        elif self.teacher.null_class is not None:
            y = with_null(y, self.teacher.null_class, draws.uniform() < self.label_drop)  # type: ignore[assignment]
        field = _Recorded(replace(self.teacher, refiner=network), plan, y, scale, self.channels)
        with torch.no_grad():
            state = State(x)
            for step, t0, t1 in plan.schedule():
                state = step(field, state, t0, t1)
            targets = [self._velocity(call) for call in field.calls]
        rows, times, labels, read, base = _joined(field.calls)
        offsets = network(rows, times, labels, read)
        return (widened(offsets) + base - torch.cat(targets)).square().mean()

    def _velocity(self, call: _Call) -> Tensor:
        return widened(self.teacher.predictor(call.rows, call.times, call.labels))


class _Call(NamedTuple):
    """What a refiner call is given, R rows, for both halves of guidance or one.

    rows, read, base: (R, C, H, W). times, labels: (R,). base: what the offset is added to.
    """

    rows: Tensor
    times: Tensor
    labels: Tensor
    read: Tensor
    base: Tensor


class _Recorded(GuidedField):
    """A field that keeps what its refiner calls are given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[_Call] = []

    def refine_and_move(
        self, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move
    ) -> tuple[Tensor, Tensor]:
        given = self._read(x, t, read), self._read(x, t, base)
        self.calls.append(_Call(*self._inputs(x, t), *(v.clone() for v in given)))
        return super().refine_and_move(x, t, read, base, move)


def _joined(calls: Sequence[_Call]) -> _Call:
    """All rows of these calls as one."""
    return _Call(*(torch.cat(parts) for parts in zip(*calls, strict=True)))
