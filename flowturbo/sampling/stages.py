"""Plans with stages on models: each stage at its size, with its batches and its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import positive
from ..models.flow_model import FlowModel
from ..models.text_to_image import PromptModel, PromptNetwork
from ..solver.path import on_path
from ..solver.plan import Plan
from ..solver.stages import Stage, StagedPlan
from .batches import Watch, run_batches
from .enlarge import Enlarger, Size, coarse_noise, taken_over
from .run import Job, StepMonitor


class Leg(NamedTuple):
    """A stage at the size of its latents.

    plan: from the time at which it takes over to that at which it stops.
    size: (H, W) of the latents, for videos (T, H, W).
    last: whether no other stage follows.
    """

    plan: Plan
    size: Size
    last: bool


class StageBatches(Protocol):
    """What runs the batches of a stage."""

    size: int
    """The default number of images per batch."""

    def run_from(self, start: Tensor, rows: Tensor, monitor: StepMonitor) -> Tensor:
        """From latents (n, C, H, W) to `run.both_ends` of them, or to the result if it is last."""
        ...

    def checked(self, result: Tensor) -> Tensor:
        """The result of all runs, or an error for what is not finite in it."""
        ...


def model_legs(model: FlowModel, plan: Plan | StagedPlan) -> list[Leg]:
    """The stages of a plan for a model; a plan without stages is one.

    Raises ValueError if there are several, and the model has one size only.
    """
    size: Any = tuple(model.latent_shape[1:])
    if isinstance(plan, Plan):
        return [Leg(plan, size, True)]
    if not isinstance(model, PromptModel) or not isinstance(model.predictor, PromptNetwork):
        raise ValueError(
            f"plan {str(plan)!r} has stages, which need a model of any size: a text-to-image model "
            f"or a callable. This one takes latents of {' x '.join(map(str, size))} only"
        )
    if len(size) != 2:
        raise ValueError(f"plan {str(plan)!r} has stages, which are for images, not for videos")
    return _legs(plan, size, model.predictor.multiple, model.shift_at)


def function_legs(plan: Plan | StagedPlan, noise: Tensor) -> list[Leg]:
    """The stages of a plan for a callable of any size. noise: (N, C, H, W) if there are several."""
    size: Any = tuple(noise.shape[2:])
    if isinstance(plan, Plan):
        return [Leg(plan, size, True)]
    if noise.ndim != 4:
        raise ValueError(
            "noise must have shape (images, channels, height, width) for a plan with stages, got "
            f"{tuple(noise.shape)}"
        )
    H, W = size
    return _legs(plan, size, 1, lambda h, w: math.sqrt(h * w / (H * W)))


def _legs(
    plan: StagedPlan, size: Size, multiple: int, shift_at: Callable[[int, int], float]
) -> list[Leg]:
    """multiple: of which the sides must be. shift_at: the shift of the time grid at a size."""

    def side(whole: int, stage: Stage) -> int:
        return max(1, round(whole * float(stage.size) / multiple)) * multiple

    sizes = [(side(size[0], stage), side(size[1], stage)) for stage in plan.stages]
    levels = plan.levels([math.sqrt(H * W) for H, W in sizes])
    return [
        Leg(stage.between(*ends, shift_at(*at)), at, stage is plan.stages[-1])
        for stage, ends, at in zip(plan.stages, levels, sizes, strict=True)
    ]


def at_size(model: FlowModel, size: tuple[int, ...]) -> FlowModel:
    """The model at another size of latents, with the same networks and graphs."""
    if model.latent_shape[1:] == size:
        return model
    resized = replace(model, latent_shape=(model.latent_shape[0], *size))
    resized.captures = model.captures
    return resized


def leg_job(model: FlowModel, leg: Leg, *options: Any) -> Job:
    """The job of one stage. options: the arguments of `Job.of` after the plan."""
    job = Job.of(at_size(model, leg.size), leg.plan, *options)
    return job if leg.last else replace(job, output="stage")


def sample_legs(
    legs: Sequence[Leg],
    runs: Sequence[StageBatches],
    noise: Tensor,
    enlarge: Enlarger,
    batch_size: int | Sequence[int] | None,
    watch: Watch,
) -> Tensor:
    """Run the stages, each on all images, batch by batch -> the result of the last one.

    runs: the batches of each stage.
    noise: (N, C, H, W), of the finished size.
    batch_size: of all stages, or one for each; None: the default of each.
    If the callback ends a stage, its latents are the result.
    """
    sizes = batch_sizes(batch_size, len(legs))
    ends: Tensor | None = None
    steps = [len(leg.plan) for leg in legs]
    for number, (leg, run, size) in enumerate(zip(legs, runs, sizes, strict=True)):
        before = legs[number - 1].plan if number else None
        runner = _Runner(run, leg, noise, enlarge, number, before, ends)
        counted = watch._replace(before=sum(steps[:number]), after=sum(steps[number + 1 :]))
        done = run_batches(runner, len(noise), leg.plan, size, counted)
        if done.stopped and not leg.last:
            *whole, newest = done.parts
            return torch.cat([*(_joined(ends, leg.plan.end) for ends in whole), newest])
        ends = torch.cat(done.parts)
    assert ends is not None
    return ends


def _joined(ends: Tensor, t: float) -> Tensor:
    """The latents at time t, (N, C, H, W), that have these two ends, (N, 2C, H, W)."""
    estimate, noise = ends.chunk(2, dim=1)
    return on_path(estimate, noise, t)


def batch_sizes(batch_size: int | Sequence[int] | None, stages: int) -> list[int | None]:
    if batch_size is None:
        return [None] * stages
    if not isinstance(batch_size, list | tuple):
        return [positive("batch_size", batch_size)] * stages  # type: ignore[arg-type]
    if len(batch_size) != stages:
        raise ValueError(
            f"batch_size must be one number, or one for each of the {stages} stages, got "
            f"{batch_size!r}"
        )
    return [positive("batch_size", size) for size in batch_size]


class _Runner:
    """The batches of a stage, from noise, or from the `ends` that the plan `before` came to."""

    def __init__(
        self,
        batches: StageBatches,
        leg: Leg,
        noise: Tensor,
        enlarge: Enlarger,
        number: int,
        before: Plan | None,
        ends: Tensor | None,
    ) -> None:
        self.batches, self.leg, self.noise, self.enlarge = batches, leg, noise, enlarge
        self.number, self.before, self.ends, self.size = number, before, ends, batches.size

    def run(self, rows: Tensor, monitor: StepMonitor) -> Tensor:
        start = coarse_noise(self.noise[rows], self.leg.size)
        if self.before is not None and self.ends is not None:
            levels = 1 - self.before.end, 1 - self.leg.plan.start
            start = taken_over(self.ends[rows], start, self.enlarge, *levels, self.number)
        return self.batches.run_from(start, rows, monitor)
