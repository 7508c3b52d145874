"""U, D and X plans in a pipeline's scheduler are diffusers' own multistep schedulers."""

from __future__ import annotations

import itertools

import exponential
import pytest
import torch
from close import assert_close, relative_error
from exponential import by_diffusers, scheduler_of
from torch import Tensor

from flowturbo import Plan

pytest.importorskip("diffusers")
from flowturbo.integrations.scheduler import PlanScheduler

MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double() / 2


def velocity(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x @ MIX.to(x.dtype) + t) - 0.4 * x


def latents(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def through(scheduler, x: Tensor, first: int = 0, change=lambda x, call: x) -> Tensor:
    """A pipeline's loop, with what it does to the latents after each call."""
    for call, timestep in enumerate(scheduler.timesteps[first:]):
        level = float(scheduler.sigmas[first + call])
        x = scheduler.step(-velocity(x, 1 - level), timestep, x, return_dict=False)[0]
        x = change(x, call)
    return x


def made(letter: str, levels: list[float]) -> PlanScheduler:
    """A plan on these noise levels, the first of which may be just below 1."""
    levels = [1.0, *levels[1:]]
    scheduler = PlanScheduler(Plan.parse(letter, grid=[1 - level for level in levels]), "plan")
    scheduler.set_timesteps(len(scheduler.plan))
    return scheduler


@pytest.mark.parametrize("options", [{}, {"final_sigmas_type": "sigma_min"}])
@pytest.mark.parametrize("steps, shift", [(1, 1.0), (2, 1.0), (5, 3.0), (10, 5.0)])
@pytest.mark.parametrize("letter", "UD")
def test_a_plan_in_the_place_of_its_own_scheduler_is_that(letter, steps, shift, options):
    """On its own noise levels. DPM-Solver++'s sigma_min is no flow's."""
    if letter == "D" and options:
        return
    theirs, x = scheduler_of(letter, shift, **options), latents(1, torch.float32)
    ours = PlanScheduler.of(scheduler_of(letter, shift, **options), f"{letter}{steps}")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
    assert ours.timesteps.equal(theirs.timesteps)
    expected = by_diffusers(theirs, velocity, x)
    for _ in range(2):  # and again, with nothing set anew
        assert_close(through(ours, x), expected, 2e-6)
    if steps > 2:
        other = PlanScheduler.of(scheduler_of(letter, shift, **options), f"A{steps}")
        other.set_timesteps(steps)
        assert relative_error(through(other, x), expected) > 1e-4


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("letter", "UD")
def test_entering_in_the_middle_is_diffusers_entering_there(letter, first):
    theirs, x = scheduler_of(letter), latents(2, torch.float32)
    theirs.set_timesteps(6)
    ours = made(f"{letter}6", theirs.sigmas.tolist())
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(first)
    assert_close(through(ours, x, first), through(theirs, x, first), 3e-6)


def test_latents_that_a_pipeline_keeps_are_kept_as_with_diffusers():
    """Inpainting sets a part of the latents after every step."""
    theirs, x, kept = scheduler_of("U", 3.0), latents(3, torch.float32), latents(4, torch.float32)
    theirs.set_timesteps(7)
    ours = made("U7", theirs.sigmas.tolist())

    def keep(x: Tensor, call: int) -> Tensor:
        level = float(theirs.sigmas[call + 1])
        masked = level * kept + (1 - level) * kept.flip(0)
        return torch.cat([x[..., :2], masked[..., 2:]], dim=-1)

    expected = through(theirs, x, change=keep)
    assert relative_error(expected, through(ours, x)) > 1e-2
    assert_close(through(ours, x, change=keep), expected, 3e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_x_plan_is_res_2s_call_by_call(shift):
    plan = Plan.parse("X4")
    scheduler = PlanScheduler(plan, "corrected", shift=shift)
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == plan.cost.predictor == 7
    assert float(scheduler.sigmas[-1]) == 0
    assert scheduler.sigmas.diff().max() < 0
    expected = x = latents(5)
    times = [1 - level for level in [*scheduler.sigmas[:-1:2].tolist(), 0.0]]
    for t0, t1 in itertools.pairwise(times):
        expected = exponential.res_2s(velocity, expected, t0, t1)
    assert_close(through(scheduler, x), expected, 1e-6)


def test_an_x_plan_entered_at_its_second_call_goes_on_from_there():
    """By Euler's step to the end of that step."""
    scheduler, x = PlanScheduler("X3", "corrected"), latents(6)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(1)
    middle, end = (1 - float(level) for level in scheduler.sigmas[1:3])
    expected = x + (end - middle) * velocity(x, middle)
    for t0, t1 in ((end, 1 - float(scheduler.sigmas[4])), (1 - float(scheduler.sigmas[4]), 1.0)):
        expected = exponential.res_2s(velocity, expected, t0, t1)
    assert_close(through(scheduler, x, 1), expected, 1e-6)
