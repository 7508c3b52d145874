"""PlanScheduler: a plan's steps in call after call, equal to plain loops and to diffusers' own
schedulers.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from close import assert_close
from oracle import heun_step, pseudo_corrector_step, refiner_step
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from flowturbo import Plan  # noqa: E402
from flowturbo.integrations.scheduler import PlanScheduler  # noqa: E402

Output = Callable[[Tensor, float], Tensor]
"""A network's output at (x, noise level): noise - data."""


def network(x: Tensor, level: float) -> Tensor:
    return torch.sin(3 * x) + level * x.flip(-1) - 0.3 * level**2


def offset(x: Tensor, level: float, v: Tensor) -> Tensor:
    return 0.1 * torch.cos(x) * v + level * 0.05


class Refine:
    """A refiner as accelerate gives one."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, x: Tensor, noise_level: float, v: Tensor) -> Tensor:
        return offset(x, noise_level, v)

    def observe(self, v: Tensor) -> None:
        """Nothing to see."""

    def stepped(self) -> None:
        self.steps += 1

    def reset(self) -> None:
        self.steps = 0

    def end(self) -> None:
        """Nothing to forget."""


def latents(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def through(scheduler, x: Tensor, first: int = 0, output: Output = network) -> Tensor:
    """What a pipeline does."""
    for timestep in scheduler.timesteps[first:]:
        x = scheduler.step(output(x, float(timestep) / 1000), timestep, x, return_dict=False)[0]
    return x


def loop(letters: str, levels: list[float], x: Tensor, cache: Tensor | None = None) -> Tensor:
    """The same by the oracle's steps, in our time."""

    def v(x: Tensor, t: float) -> Tensor:
        return -network(x, 1 - t)

    def r(x: Tensor, t: float, velocity: Tensor) -> Tensor:
        return offset(x, 1 - t, velocity)

    history: list[tuple[float, Tensor]] = []
    for letter, a, b in zip(letters, levels, levels[1:], strict=False):
        t, t_next = 1 - a, 1 - b
        if letter == "H":
            x, cache = heun_step(v, x, t, t_next)
        elif letter == "P":
            x, cache = pseudo_corrector_step(v, x, t, t_next, cache)
        elif letter == "R":
            assert cache is not None
            x, cache = refiner_step(r, x, t, t_next, cache)
        else:
            cache = v(x, t)
            history.append((t, cache))
            h = t_next - t
            if letter == "E" or len(history) == 1:
                x = x + h * cache
            else:  # two steps of Adams-Bashforth on any grid
                (before, old), _ = history[-2:]
                share = h / (2 * (t - before))
                x = x + h * ((1 + share) * cache - share * old)
    return x


def made(plan: str | Plan, grid: str = "pipeline", **stock) -> PlanScheduler:
    scheduler = PlanScheduler(plan, grid, **stock)
    scheduler.refiner = Refine()
    return scheduler


def levels_of(scheduler: PlanScheduler) -> list[float]:
    """Noise levels at the ends of the steps."""
    return [1 - t for t in scheduler._times]


@pytest.mark.parametrize(
    "letters", ["E4", "H3", "H1P5", "H2P3", "P4", "E2H1P2", "A5", "H1P5R3", "H1P2R1P2", "H1R1H1R2"]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_call_after_call_is_the_loop(letters, shift):
    scheduler, x = made(letters, shift=shift), latents(1)
    scheduler.set_timesteps(len(scheduler.plan))
    cost = scheduler.plan.cost
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == cost.predictor
    levels = levels_of(scheduler)
    assert (levels[0], levels[-1]) == (1, 0)
    # timesteps are float32: a network is told levels that are rounded so
    assert_close(through(scheduler, x), loop(scheduler.plan.letters, levels, x), 1e-6)
    assert scheduler.refiner.steps == cost.predictor  # type: ignore[union-attr]
    assert_close(
        through(scheduler, x), loop(scheduler.plan.letters, levels, x), 1e-6
    )  # and again, with nothing set anew


def test_an_e_plan_is_the_stock_scheduler():
    for stock in ({}, {"shift": 3.0}):
        euler, ours = diffusers.FlowMatchEulerDiscreteScheduler(**stock), made("E7", **stock)
        x = latents(2, torch.float32)
        for scheduler in (euler, ours):
            scheduler.set_timesteps(7)
        assert ours.timesteps.equal(euler.timesteps)
        assert ours.sigmas.equal(euler.sigmas)
        assert_close(through(ours, x), through(euler, x), 1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_h_plan_is_diffusers_heun(shift):
    """Whose last step, to noise level 0, is Euler's, so that it never calls the network there."""
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    heun.set_timesteps(6)
    x = latents(3, torch.float32)
    expected = through(heun, x)
    ends = [1.0, *sorted(set(heun.sigmas.tolist()) - {1.0}, reverse=True)]
    ours = made(Plan.parse("H5E1", grid=[1 - level for level in ends]), "plan")
    ours.set_timesteps(6)
    assert len(ours.timesteps) == len(heun.timesteps) == 11
    assert_close(ours.timesteps, heun.timesteps, 1e-6)
    assert_close(through(ours, x), expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(through(made_on("E6", ends), x), expected, 1e-3)


def made_on(letters: str, ends: list[float]) -> PlanScheduler:
    scheduler = made(Plan.parse(letters, grid=[1 - level for level in ends]), "plan")
    scheduler.set_timesteps(len(scheduler.plan))
    return scheduler


def test_grids():
    count, shift = 5, 3.0
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(count)
    twice, once, own = (
        made("H1P4", grid, shift=shift) for grid in ("pipeline", "corrected", "plan")
    )
    for scheduler in (twice, once, own):
        scheduler.set_timesteps(count)
    assert levels_of(twice) == pytest.approx(stock.sigmas.tolist(), abs=1e-7)
    linear = [1 - i / count for i in range(count)]
    assert levels_of(once) == pytest.approx(
        [*(shift * s / (1 + (shift - 1) * s) for s in linear), 0], abs=1e-6
    )
    assert (
        levels_of(twice)[-2] < levels_of(once)[-2] / 2
    )  # the slip of which the corrected grid is free
    assert levels_of(own) == pytest.approx([*linear, 0], abs=1e-7)
    shifted = made(Plan.parse("H1P4", shift=2.0), "auto", shift=shift)
    assert shifted.grid == "plan"
    shifted.set_timesteps(count)
    assert levels_of(shifted) == pytest.approx([*(2 * s / (1 + s) for s in linear), 0], abs=1e-6)
    assert made("H1P4", "auto").grid == "pipeline"


def test_noise_levels_that_are_given_are_resampled():
    scheduler = made("H1P3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.1])
        assert levels_of(scheduler) == pytest.approx([1, 0.8, 0.5, 0.1, 0], abs=1e-6)
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1])
        assert levels_of(scheduler) == pytest.approx([1, 0.8, 0.4, 0.2, 0], abs=1e-6)
        scheduler.set_timesteps(timesteps=[1000.0, 700.0, 400.0, 100.0])
        assert levels_of(scheduler) == pytest.approx([1, 0.7, 0.4, 0.1, 0], abs=1e-6)
        dynamic = made("H1P3", use_dynamic_shifting=True)
        dynamic.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.7)
        stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.7)
    assert levels_of(dynamic) == pytest.approx(stock.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_entering_in_the_middle_runs_the_rest_of_the_plan(first):
    """Calls of H1P4 are at the ends 0, 1, 2, ...: the one inside H is that of the state where the
    next step starts.
    """
    scheduler = made("H1P4", shift=2.0)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(first)
    source, noise = latents(5), latents(6)
    levels = levels_of(scheduler)
    start = scheduler.scale_noise(source, scheduler.timesteps[first : first + 1], noise)
    level = float(scheduler.sigmas[first])
    assert level == pytest.approx(levels[first], abs=1e-7)
    assert_close(start, level * noise + (1 - level) * source, 1e-6)
    rest = loop("P" * (5 - first), levels[first:], start, -network(start, levels[first]))
    assert_close(through(scheduler, start, first), rest, 1e-6)


def test_what_a_callback_does_to_the_latents_is_done_to_the_state():
    """Between two calls of one step, the change moves the step's start too."""
    scheduler, x, change = made("H2", "corrected"), latents(7), 0.1 * latents(8)
    scheduler.set_timesteps(2)
    first, second, *rest = scheduler.timesteps
    y = scheduler.step(network(x, float(first) / 1000), first, x, return_dict=False)[0]
    y = y + change
    y = scheduler.step(network(y, float(second) / 1000), second, y, return_dict=False)[0]
    for timestep in rest:
        y = scheduler.step(network(y, float(timestep) / 1000), timestep, y, return_dict=False)[0]
    # By hand: d at x, d' at the moved prediction; the step starts from x + change.
    h, d = 0.5, -network(x, 1.0)
    moved = x + change + h / 2 * (d - network(x + h * d + change, 0.5))
    assert_close(y, loop("H", [0.5, 0.0], moved), 1e-6)


def test_latents_in_half_precision_keep_a_state_in_float32():
    scheduler, x = made("H1P6"), latents(9, torch.bfloat16)
    scheduler.set_timesteps(7)

    def rounded(x: Tensor, level: float) -> Tensor:
        assert x.dtype == torch.bfloat16
        return network(x.float(), level).bfloat16()

    result = through(scheduler, x, output=rounded)
    assert result.dtype == torch.bfloat16
    levels = levels_of(scheduler)
    assert_close(result, loop("HPPPPPP", levels, x.double()), 2e-2)


def test_threads_share_a_scheduler():
    scheduler = made("H1P3R1", shift=3.0)
    starts = [latents(seed) for seed in range(6)]

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(5)
        return through(scheduler, x)

    expected = [run(x) for x in starts]
    barrier, found, errors = (
        threading.Barrier(len(starts)),
        dict[int, list[Tensor]](),
        list[BaseException](),
    )

    def work(number: int) -> None:
        try:
            barrier.wait()
            found[number] = [run(starts[number]) for _ in range(10)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, results in found.items():
        assert all(result.equal(expected[number]) for result in results)
    assert len(found) == len(starts)


@pytest.mark.parametrize("grid", ["auto", "pipeline", "corrected"])
def test_copies_and_configurations_make_the_same_scheduler(tmp_path, grid):
    scheduler, x = made(Plan.parse("H1P3", shift=2.0), grid, shift=3.0, base_shift=0.4), latents(4)
    scheduler.set_timesteps(4)
    expected = through(scheduler, x)
    scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    copies = [
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
        PlanScheduler.from_config(scheduler.config),
    ]
    for other in (*copies, again):
        assert (other.plan, other.grid) == (scheduler.plan, scheduler.grid)
        assert (other.config["shift"], other.config["base_shift"]) == (3.0, 0.4)
        if other.timesteps is None or other.num_inference_steps is None:
            other.set_timesteps(4)
        assert_close(through(other, x), expected, 1e-12)
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert type(stock) is diffusers.FlowMatchEulerDiscreteScheduler


def test_arguments():
    with pytest.raises(TypeError, match="not of DDIMScheduler"):
        PlanScheduler.of(diffusers.DDIMScheduler(), "H1")
    with pytest.raises(ValueError, match="grid must be"):
        PlanScheduler("H1", "uniform")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must start at 0"):
        PlanScheduler(Plan.parse("H1").starting_at(0.5))
    with pytest.raises(ValueError, match="no guidance interval"):
        PlanScheduler(Plan.parse("H1", guidance_interval=(0.1, 0.9)))
    with pytest.raises(ValueError, match="stochastic_sampling"):
        PlanScheduler("H1", stochastic_sampling=True)
    scheduler = PlanScheduler("H1R1")
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="give accelerate a refiner"):
        through(scheduler, latents(0))
    plain = PlanScheduler("E2")
    plain.set_timesteps(2)
    with pytest.raises(ValueError, match="no further arguments"):
        plain.step(latents(0), plain.timesteps[0], latents(0), per_token_timesteps=torch.zeros(2))


def test_other_numbers_of_steps_are_warned_of_once():
    scheduler = made("H1P5")
    with pytest.warns(
        UserWarning, match="28 steps were asked for: plan H1P5 has 6 and makes 7 predictor calls"
    ):
        scheduler.set_timesteps(28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(50)
        made("H1P5").set_timesteps(6)
        made("H1P5").set_timesteps(7)
