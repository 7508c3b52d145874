"""Training objectives: flow matching for a predictor, and refinement for a velocity refiner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flowturbo_kernels import guide
from flowturbo_kernels.arguments import wide

from ..models.flow_model import Network
from ..models.text_to_image import Conditions, Labels
from ..runtime.rng import StepRandom
from ..solver.path import on_path, path_velocity

Objective = Callable[[Network, Tensor, Any, StepRandom], Tensor]
"""(network, data, labels or conditions, the step's random numbers) -> the loss, ()."""


def drop_labels(y: Tensor, null_class: int, probability: float, draws: StepRandom) -> Tensor:
    """y (N,) -> the labels, each replaced by the null class with this probability."""
    return cast(Tensor, with_null(y, null_class, draws.uniform() < probability))


def with_null(y: Labels, null: int | Conditions, rows: Tensor) -> Labels:
    """y with the null class, or the null conditions, in the rows that `rows` (N,) bool selects.

    null: the class number, or one row of each condition; a condition without one stays as it is.
    """
    if isinstance(y, Tensor):
        return torch.where(rows.to(y.device), cast(int, null), y)
    empty = cast(Conditions, null)
    replaced = {
        name: torch.where(
            rows.to(value.device).view(-1, *[1] * (value.ndim - 1)), empty[name].to(value), value
        )
        for name, value in y.items()
        if name in empty
    }
    return {**y, **replaced}


def joined(first: Labels, second: Labels) -> Labels:
    """The rows of `first`, then those of `second`."""
    if isinstance(first, Tensor):
        return torch.cat([first, cast(Tensor, second)])
    return {
        name: torch.cat([value, cast(Conditions, second)[name]]) for name, value in first.items()
    }


def widened(x: Tensor) -> Tensor:
    """x in float32 or wider. Under autocast networks return bfloat16, and their differences, which
    are small, would be rounded as velocities are.
    """
    return x.to(wide(x))


def drawn_scale(guidance: tuple[float, float], data: Tensor, draws: StepRandom) -> Tensor:
    """A guidance scale for each row of data, (N,), uniform in the range (low, high)."""
    low, high = guidance
    return low + (high - low) * draws.uniform().to(data)


@dataclass(frozen=True)
class Times:
    """The times of training rows: uniform, as SiT's, or mostly logit-normal, as SD3's.

    mean, std: of logit t, where it is normal (Esser et al. 2024, section 3.1); mean None: uniform.
    uniform: the share of rows whose time is uniform all the same, so that no time is never seen.
    """

    mean: float | None = None
    std: float = 1.0
    uniform: float = 0.0

    def draw(self, data: Tensor, draws: StepRandom) -> Tensor:
        """data (N, ...) -> times (N,)."""
        t = draws.uniform()
        if self.mean is not None:
            logit = self.mean + self.std * draws.normal(())
            t = torch.where(draws.uniform() < self.uniform, t, logit.sigmoid())
        return t.to(data)


@dataclass(frozen=True)
class FlowMatching:
    """mean ||v(x_t, t, y) - (x1 - x0)||^2 on the linear path, as SiT trains.

    label_drop: the probability with which a label becomes the null class, for guidance.
    times: how t is drawn.
    """

    null_class: int
    label_drop: float = 0.1
    times: Times = Times()

    def __call__(self, network: Network, data: Tensor, y: Tensor, draws: StepRandom) -> Tensor:
        """data (N, C, H, W), y (N,) -> the loss, ()."""
        x0 = draws.normal(data.shape[1:]).to(data)
        t = self.times.draw(data, draws)
        dropped = drop_labels(y, self.null_class, self.label_drop, draws)
        v = network(on_path(data, x0, t), t, dropped)
        return (v - path_velocity(data, x0)).square().mean()


@dataclass(frozen=True)
class Refinement:
    """The refiner's objective (paper, section 3.2), in the form of FlowTurbo's public code.

    A frozen predictor, the teacher, gives v at (x_t, t). An Euler step of length
    D ~ U(0, delta_max) along v leads to x' = x_t + D v at t + D. From x' and v the refiner learns
    the offset from v to the teacher's velocity at (x', t + D).

    null: the null class, or the conditions of the empty prompt, one row each.
    guidance_channels: how many channels guidance acts on.
    label_drop: the probability with which refiner and target get the null class.

    The defaults are those of the public code. Three of its choices look like slips; each has an
    option:

    inside: keep t + D <= 1, with t ~ U(0, 1 - D). The public code lets t + D exceed 1.
    delta_per_row: draw D for each row. The public code draws one D for the whole batch.
    drop_before: v also gets the dropped label, as in the paper. The public code always gives v the
        true label.

    Two options go beyond paper and code:

    guidance: (low, high) with high > 1 makes v, and so the step, the guided velocity with a scale
        drawn from U(low, high) for each row: that is what a refiner is fed in guided sampling. The
        targets stay unguided, since sampling guides the offsets too.
    embedded: for a teacher that takes the guidance scale as an input (FLUX.1-dev), both networks
        get this scale instead.
    """

    teacher: Callable[[Tensor, Tensor, Any], Tensor]
    null: int | Conditions
    guidance_channels: int
    label_drop: float = 0.1
    delta_max: float = 0.12
    inside: bool = False
    delta_per_row: bool = False
    drop_before: bool = False
    guidance: tuple[float, float] = (1.0, 1.0)
    embedded: bool = False

    def __call__(self, network: Network, data: Tensor, y: Labels, draws: StepRandom) -> Tensor:
        """data (N, C, H, W), y (N,) or conditions (N, ...) -> the loss, ()."""
        x0 = draws.normal(data.shape[1:]).to(data)
        t = draws.uniform().to(data)
        drop = draws.uniform() < self.label_drop
        if self.embedded:
            y = {
                **cast(Conditions, y),
                "embedded_guidance": drawn_scale(self.guidance, data, draws),
            }
        dropped = with_null(y, self.null, drop)
        if isinstance(y, Tensor):
            drop = cast(Tensor, dropped == self.null)  # includes rows unlabelled from the start
        if self.delta_per_row:
            delta = self.delta_max * draws.uniform().to(data)
        else:
            delta = torch.full_like(t, self.delta_max * float(draws.shared.random()))
        if self.inside:
            t = t * (1 - delta)
        later = t + delta
        with torch.no_grad():
            x = on_path(data, x0, t)
            step, v = self._cached_velocity(x, t, y, dropped, drop, draws)
            x = x + delta.view(-1, *[1] * (x.ndim - 1)) * step
            target = widened(self.teacher(x, later, dropped))
        offset = network(x, later, cast(Any, dropped), v)
        return (widened(offset) + v - target).square().mean()

    def _cached_velocity(
        self, x: Tensor, t: Tensor, y: Labels, dropped: Labels, drop: Tensor, draws: StepRandom
    ) -> tuple[Tensor, Tensor]:
        """The velocity along which x steps, and the velocity that the refiner reads, both as x.

        With guidance a sampler caches a conditional and an unconditional half, which differ in the
        unguided channels; a row whose label is dropped stands for the unconditional half.
        """
        if self.guidance[1] == 1 or self.embedded:
            v = widened(self.teacher(x, t, dropped if self.drop_before else y))
            return v, v
        scale = drawn_scale(self.guidance, x, draws)
        null = with_null(y, self.null, torch.ones_like(drop))
        both = widened(self.teacher(torch.cat([x, x]), torch.cat([t, t]), joined(y, null)))
        folded = both.flatten(2, -2)  # a video's frames lie below each other
        guided = guide(folded, scale.view(-1, 1, 1, 1), self.guidance_channels)
        conditional, unconditional = guided.reshape(both.shape).chunk(2)
        rows = drop.to(x.device).view(-1, *[1] * (x.ndim - 1))
        cached = torch.where(rows, unconditional, conditional)
        return conditional, cached  # the sampler's state always follows the conditional half
