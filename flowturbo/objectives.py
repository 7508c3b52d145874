"""What is minimised: flow matching for a predictor, and the velocity refiner's objective for a refiner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowturbo_kernels import guide

from .models import Network
from .path import on_path, path_velocity
from .rng import Draws


def drop_labels(y: Tensor, null_class: int, probability: float, draws: Draws) -> Tensor:
    """Each label becomes the null class with this probability."""
    return torch.where(draws.uniform().to(y.device) < probability, null_class, y)


@dataclass(frozen=True)
class FlowMatching:
    """mean ||v(x_t, t, y) - (x1 - x0)||^2 with t ~ U(0, 1), each label dropped with `label_drop` (SiT, linear path)."""

    null_class: int
    label_drop: float = 0.1

    def __call__(self, network: Network, data: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """data (N, C, H, W), y (N,) -> the loss, a scalar."""
        x0 = draws.normal(data.shape[1:]).to(data)
        t = draws.uniform().to(data)
        dropped = drop_labels(y, self.null_class, self.label_drop, draws)
        v = network(on_path(data, x0, t), t, dropped)
        return (v - path_velocity(data, x0)).square().mean()


@dataclass(frozen=True)
class Refinement:
    """The refiner's objective (paper section 3.2, in the public code's form).

    A frozen predictor gives v at (x_t, t). After an Euler step of length D ~ U(0, delta_max) along v, the refiner, reading v and
    the state x' = x_t + D v at t + D, learns the offset from v to the predictor's velocity there.

    The defaults are the public code's. Three of its points look like slips, and each has an option:
    inside: keep t + D <= 1, by t ~ U(0, 1 - D); the public code lets it pass 1.
    delta_per_row: draw D for each row; the public code draws one for the whole batch.
    drop_before: drop the label for v too, as the paper has it; the public code gives v the true label always.
    Beyond both: guidance = (low, high) with high > 1 makes v, and the step, the guided velocity with a scale s ~ U(low, high) for
    each row, which is what a refiner is fed when sampling with guidance. The targets stay unguided, since guidance acts on the
    offsets too.
    """

    teacher: Callable[[Tensor, Tensor, Tensor], Tensor]
    null_class: int
    guidance_channels: int
    label_drop: float = 0.1
    delta_max: float = 0.12
    inside: bool = False
    delta_per_row: bool = False
    drop_before: bool = False
    guidance: tuple[float, float] = (1.0, 1.0)

    def __call__(self, network: Network, data: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """data (N, C, H, W), y (N,) -> the loss, a scalar."""
        x0 = draws.normal(data.shape[1:]).to(data)
        t = draws.uniform().to(data)
        dropped = drop_labels(y, self.null_class, self.label_drop, draws)
        if self.delta_per_row:
            delta = self.delta_max * draws.uniform().to(data)
        else:
            delta = torch.full_like(t, self.delta_max * float(draws.shared.random()))
        if self.inside:
            t = t * (1 - delta)
        later = t + delta
        with torch.no_grad():
            x = on_path(data, x0, t)
            moving, v = self._cached_velocity(x, t, y, dropped, draws)
            x = x + delta.view(-1, 1, 1, 1) * moving
            target = self.teacher(x, later, dropped)
        offset = network(x, later, dropped, v)
        return (offset + v - target).square().mean()

    def _cached_velocity(self, x: Tensor, t: Tensor, y: Tensor, dropped: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The velocity that moves x, and what the sampler's cache would hold for these rows, each in the half it stands for."""
        low, high = self.guidance
        if high == 1:
            v = self.teacher(x, t, dropped if self.drop_before else y)
            return v, v
        scale = low + (high - low) * draws.uniform().to(x)
        null = torch.full_like(y, self.null_class)
        both = self.teacher(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        guided = guide(both, scale.view(-1, 1, 1, 1), self.guidance_channels)
        conditional, unconditional = guided.chunk(2)
        cached = torch.where((dropped == self.null_class).view(-1, 1, 1, 1), unconditional, conditional)
        return conditional, cached  # x always moves by the conditional half
