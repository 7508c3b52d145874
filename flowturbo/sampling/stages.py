"""Plans with stages on models: each stage at its size, with its batches and its graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import listed, positive
from ..models.flow_model import FlowModel
from ..models.sit import SiT
from ..models.text_to_image import PromptNetwork
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

    Raises ValueError if there are several, and the model was not trained at their sizes. Warns of
    refiner steps at sizes that the refiner was not trained at.
    """
    size: Any = tuple(model.latent_shape[1:])
    if isinstance(plan, Plan):
        legs = [Leg(plan, size, True)]
    else:
        if len(size) != 2:
            raise ValueError(f"plan {str(plan)!r} has stages, which are for images, not for videos")
        any_size = isinstance(model.predictor, PromptNetwork)
        legs = _legs(plan, size, model.multiple, model.shift_at)
        if not any_size:
            _check_sizes(model, plan, legs)
    _warn_of_refiner(model, legs)
    return legs


def _check_sizes(model: FlowModel, plan: StagedPlan, legs: Sequence[Leg]) -> None:
    """ValueError unless a model was trained at the sizes of these stages."""
    whole = model.latent_shape[1:]
    other = [leg.size for leg in legs if leg.size != whole and not model.trained_at(*leg.size)]
    if not other:
        return
    own = (model.drawn or model.latent_shape)[1:]
    (H, W), known = other[0], {own, *((side, side) for side in model.sides)}
    hint = f"; to try it, say so: model.sides += ({H},)" if H == W else ""
    raise ValueError(
        f"plan {str(plan)!r} has stages, which need a model of any size (text to image, or a "
        "callable), or one that was trained at theirs. This one was trained on latents of "
        f"{listed([f'{h} x {w}' for h, w in sorted(known)])}, and a stage needs {H} x {W}{hint}"
    )


def _warn_of_refiner(model: FlowModel, legs: Sequence[Leg]) -> None:
    refiner = model.refiner
    if not isinstance(refiner, SiT):
        return
    for leg in legs:
        if leg.plan.cost.refiner and not refiner.config.trained_at(*leg.size):
            warnings.warn(
                f"plan {leg.plan} has refiner steps at latents of {leg.size[0]} x {leg.size[1]}, "
                "which the refiner was not trained on: plans without may be better",
                stacklevel=5,
            )


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


def leg_job(model: FlowModel, leg: Leg, *options: Any) -> Job:
    """The job of one stage. options: the arguments of `Job.of` after the plan."""
    job = Job.of(model.at_size(leg.size), leg.plan, *options)
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
