"""What a diffusers scheduler of any class becomes with a plan.

Time is 1 - sigma, sigma being diffusers' noise level, and the velocity, data - noise, is minus the
model's output. Schedulers with `invert_sigmas` count sigma from noise to data: there time is sigma,
the velocity the output itself.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..solver.plan import Plan
from ..solver.steps import EXPONENTIAL
from .masked_class import masked_class, stock_class
from .meter import Meter
from .noise_levels import Timesteps, resampled
from .plan_run import Refine, Run, predictor_calls, version_of
from .thread_values import PerThread

Grid = Literal["auto", "pipeline", "corrected", "plan"]

_UNUSED = {"generator", "s_churn", "s_tmin", "s_tmax", "s_noise", "variance_noise", "eta"}
"""Arguments of stock steps that say nothing to a step without noise."""

DRESSED = ("set_timesteps", "step")


class PlanSteps:
    """What a scheduler of any class becomes with a plan: `set_timesteps` and `step` are a plan's.

    Before it in the order of methods; behind it stands the stock class, whose `set_timesteps` makes
    the noise levels.
    """

    timesteps, sigmas, num_inference_steps = PerThread(), PerThread(), PerThread()
    _step_index, _begin_index = PerThread(shown=False), PerThread(shown=False)
    _times, _own_sigmas = PerThread(), PerThread()
    _run = PerThread(shown=False)
    ended = PerThread(shown=False)  # the state that a run came to, if it is to be kept
    keeps_end = False

    plan: Plan
    grid: Grid
    refiner: Refine | None
    meter: Meter
    config: Any
    stock: Any = None  # the scheduler that it takes the place of

    def _adopt_plan(self, plan: Plan, grid: Grid) -> None:
        """Take the plan and its kind of grid, checked."""
        self.plan = plan
        if grid not in ("auto", "pipeline", "corrected", "plan"):
            raise ValueError(
                f"grid must be 'auto', 'pipeline', 'corrected' or 'plan', got {grid!r}"
            )
        if plan.start:
            raise ValueError(
                f"plan must start at 0, got {plan.start:g}: pipelines start later by "
                "themselves, by strength"
            )
        if plan.guidance_interval != (0.0, 1.0):
            raise ValueError(
                f"plan must have no guidance interval, got {plan.guidance_interval}: a "
                "pipeline guides by itself"
            )
        if grid == "corrected" and not isinstance(self, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                "grid must not be 'corrected' for a scheduler that applies its shift once, got a "
                f"{type(self).__name__}"
            )
        uniform = all(abs(t - i / len(plan)) < 1e-12 for i, t in enumerate(plan.grid))
        if plan.weights and grid not in ("auto", "plan"):
            raise ValueError(
                "grid must be 'plan' for a plan with fitted weights, which hold on its own grid "
                f"alone, got {grid!r}"
            )
        if plan.weights or (grid == "auto" and not uniform):
            self.grid = "plan"
        else:
            self.grid = "pipeline" if grid == "auto" else grid
        self.refiner = None
        self.meter = Meter()
        self._warned = False
        self._run = None

    @property
    def calls(self) -> int:
        """Predictor calls of a whole run (NFE)."""
        return self.plan.cost.predictor

    @property
    def _ascending(self) -> bool:
        """Whether sigma rises from noise to data."""
        return bool(self.config.get("invert_sigmas"))

    def _turned(self, values: Iterable[float]) -> list[float]:
        """Noise levels as times, or times as noise levels."""
        return list(values) if self._ascending else [1 - value for value in values]

    def scale_model_input(self, sample: Tensor, *args: Any, **options: Any) -> Tensor:
        """The sample as it is: flow models read it so."""
        return sample

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        """Set the noise levels, as for `len(plan)` Euler steps of the stock scheduler.

        Takes what the stock scheduler takes. sigmas or timesteps of another number are interpolated
        to that number.
        """
        stock: Any = super().set_timesteps  # type: ignore[misc]
        given = _signature(stock.__func__).bind(self, *args, **options).arguments
        del given["self"]
        given |= given.pop("kwargs", {})
        self._warn_of_other_numbers(given)
        count = len(self.plan)
        custom = {
            name: resampled(given[name], count)
            for name in ("sigmas", "timesteps")
            if given.get(name) is not None
        }
        if not custom and self.grid == "corrected":
            custom = {"sigmas": np.linspace(1, 1 / count, count)}
        rest = {k: v for k, v in given.items() if k not in ("num_inference_steps", *custom)}
        stock(num_inference_steps=count, **rest, **custom)
        self._spread_out()
        if self.refiner is not None:
            self.refiner.reset()
        self.meter.begin()

    def _spread_out(self) -> None:
        """From the stock scheduler's levels, one a step, to those of all predictor calls."""
        stock = self.sigmas
        timesteps = Timesteps(stock, self.timesteps, self.config["num_train_timesteps"])
        levels = stock.tolist()
        if len(levels) != len(self.plan) + 1:
            raise ValueError(
                f"{type(self).__name__} made {len(levels) - 1} steps where the plan has "
                f"{len(self.plan)}"
            )
        if self.grid == "plan":
            levels = [float(np.float32(level)) for level in self._turned(self.plan.grid)]
        self._times = self._turned(levels)
        if min(self._times) < 0 and set(self.plan.letters) & set(EXPONENTIAL):
            raise ValueError(
                f"plan must have no U, D or X steps for noise levels up to {max(levels):g}, got "
                f"{self.plan}: these steps need levels from 0 to 1"
            )
        points = predictor_calls(self.plan.steps, self._times)
        called = self._turned(point.time for point in points)
        self.timesteps = timesteps.at(called, self.timesteps.device)
        own = torch.tensor([*called, levels[-1]], dtype=torch.float32, device="cpu")
        self.sigmas = own.to(stock.device, copy=True)
        # On the host, so that no step waits for the device.
        self._own_sigmas = own.tolist(), self.sigmas, version_of(self.sigmas)
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = self._run = None

    def _warn_of_other_numbers(self, given: Mapping[str, Any]) -> None:
        listed = [given[name] for name in ("sigmas", "timesteps") if given.get(name) is not None]
        requested = given.get("num_inference_steps") or (len(listed[0]) if listed else 0)
        if requested not in (len(self.plan), self.calls) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{requested} steps were asked for: plan {self.plan} has {len(self.plan)} and "
                f"makes {self.calls} predictor calls, whatever num_inference_steps says",
                stacklevel=4,
            )

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Take the output of a predictor call -> where to make the next one.

        After the last call it returns the result. sample: the latents, (N, ...).
        """
        started = time.perf_counter()
        stock: Any = super().step  # type: ignore[misc]
        given = _signature(stock.__func__).bind(
            self, model_output, timestep, sample, *args, **options
        )
        return_dict = _check_unused(given.arguments)
        run = self._running(timestep, sample, model_output.dtype)
        wide = run.position.dtype
        v = model_output.to(wide, copy=True) if self._ascending else -model_output.to(wide)
        self._check_at_zero(v)
        if self.refiner is not None:
            self.refiner.observe(v)
        run.take(v, self.refiner)
        if self.refiner is not None:
            self.refiner.stepped()
        self._step_index += 1
        if self._step_index == len(self.timesteps):
            self._run = None
            self.ended = run.state if self.keeps_end else None
            if self.refiner is not None:
                self.refiner.end()
        x: Any = run.give()
        self.meter.called(started)
        if not return_dict:
            return (x,)
        if isinstance(self, FlowMatchEulerDiscreteScheduler):
            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)
        return SchedulerOutput(prev_sample=x)

    def _running(self, timestep: Any, sample: Tensor, dtype: torch.dtype) -> Run:
        """The present run, with what the pipeline has done to its latents; else a new one."""
        run = self._run
        if run is not None and run.adopt(sample):
            return run
        if run is None:
            self._step_index = self._first_call(timestep)
            self._adopt_sigmas()
        # A pipeline that has changed the shape of its latents goes on without earlier velocities.
        cut = run is not None
        run = Run(self.plan.steps, self._times, self._step_index, sample, dtype)
        if cut and run.within_a_step:
            raise ValueError(
                f"plan {self.plan} is within a step of two calls where the pipeline changes the "
                f"shape of its latents to {tuple(sample.shape)}: choose a plan of one-call steps"
            )
        self._run = run
        return run

    def _first_call(self, timestep: Any) -> int:
        """The number of the call that a run begins with, by the timestep that it is made at.

        The stock scheduler looks for its value, but two calls may be at one level.
        """
        if self._begin_index is not None:
            return int(self._begin_index)
        own = self.timesteps
        if (
            isinstance(timestep, Tensor)
            and timestep.numel() == 1
            and timestep.dtype == own.dtype
            and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
        ):
            return int(timestep.storage_offset() - own.storage_offset())
        ended = self._step_index == len(own)
        self._init_step_index(timestep)  # type: ignore[attr-defined]
        found = int(self._step_index)
        if ended and found:
            raise ValueError(
                f"plan {self.plan} makes {self.calls} predictor calls, and the pipeline makes "
                f"another at timestep {float(timestep):g}"
            )
        return found

    def abandon(self) -> None:
        """Forget this thread's run, which a failed or interrupted call may have left."""
        self._run = None
        if self.refiner is not None:
            self.refiner.end()

    def _adopt_sigmas(self) -> None:
        """Follow a pipeline that has written to `sigmas` after set_timesteps (Cosmos 2 does)."""
        own, tensor, version = self._own_sigmas
        if self.sigmas is tensor and version_of(tensor) == version >= 0:
            return
        if len(self.sigmas) != len(own):
            raise ValueError(
                f"a plan makes {len(own) - 1} predictor calls, but the pipeline has set "
                f"{len(self.sigmas)} sigmas after set_timesteps"
            )
        new = self.sigmas.tolist()
        moved = dict(zip(own[:-1], new[:-1], strict=True))
        levels = [moved.get(level, level) for level in self._turned(self._times)[:-1]]
        self._times = self._turned([*levels, new[-1]])

    def _check_at_zero(self, v: Tensor) -> None:
        """Fail if the network's output is not finite where the plan calls it on data."""
        level = self._own_sigmas[0][self._step_index]
        if level == (1.0 if self._ascending else 0.0) and not bool(v.isfinite().all()):
            raise ValueError(
                f"plan {self.plan} calls the network at noise level 0, where this pipeline's "
                "output is not finite: choose a plan that ends in a one-call step, such as A7 or "
                "H1P4E1"
            )

    def __copy__(self) -> Any:
        made = type(self).__new__(type(self))
        made.__dict__.update(vars(self))
        threads = vars(self).get("_threads")
        made.__dict__ |= {"_threads": copy.copy(threads), "meter": Meter()}
        made._run = None
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with a run of its own, as pipelines make for sound beside pictures.

        It shares the refiner, unless that was copied with the whole pipeline.
        """
        kind = type(self)
        memo[id(self)] = made = kind.__new__(kind)
        network = getattr(self.refiner, "network", None)
        if self.refiner is not None and id(network) not in memo:
            memo[id(self.refiner)] = self.refiner
        made.__dict__.update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return revive, (stock_class(type(self)), dict(vars(self)))


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _check_unused(arguments: Mapping[str, Any]) -> bool:
    """Refuse arguments of a step that a plan can't heed -> return_dict."""
    given = dict(arguments)
    given |= given.pop("kwargs", {})
    heeded = {"self", "model_output", "timestep", "sample", "return_dict"} | _UNUSED
    extra = {k: v for k, v in given.items() if k not in heeded and v is not None}
    if extra:
        raise ValueError(f"a plan's steps take no further arguments, got {', '.join(extra)}")
    return given.get("return_dict", True)


def revive(stock: Any, values: dict[str, Any]) -> Any:
    """A scheduler with a plan from its attributes, or from those of a stock scheduler."""
    kind = stock if issubclass(stock, PlanSteps) else masked_class(PlanSteps, stock, DRESSED)
    scheduler = kind.__new__(kind)
    for name, value in values.items():
        if isinstance(inspect.getattr_static(kind, name, None), PerThread):
            setattr(scheduler, name, value)
        else:
            scheduler.__dict__[name] = value
    return scheduler
