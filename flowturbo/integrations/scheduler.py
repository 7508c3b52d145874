"""A plan as a diffusers scheduler: one "timestep" is one predictor call.

So any flow-matching pipeline can run the steps of a plan. Time here is minus diffusers' noise level
sigma, from -1 to 0. It rises as our time does, the length of a step is the difference of two
sigmas, and the velocity, data - noise, is minus the model's output.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from ..solver.plan import Plan, as_plan
from ..solver.steps import Field, State, Step

Grid = Literal["auto", "pipeline", "corrected", "plan"]


class Refine(Protocol):
    """A refiner that knows the arguments of the predictor's last call."""

    def __call__(self, x: Tensor, noise_level: float, v: Tensor) -> Tensor:
        """x (N, ...), velocity v like x -> the refiner's offset, like x."""
        ...

    def stepped(self) -> None:
        """The scheduler has finished a step."""
        ...


class Point(NamedTuple):
    """A predictor call: the number of its step, and its time."""

    step: int
    time: float


class _VelocityNeeded(Exception):
    """A step needs the predictor's velocity at x and t."""

    def __init__(self, x: Tensor, t: float) -> None:
        super().__init__()
        self.x, self.t = x, t


class _KnownVelocities(Field):
    """A field that answers predictor calls with velocities that are known already."""

    def __init__(self, velocities: Sequence[Tensor], refine: Refine | None) -> None:
        self._unread, self._refine = list(velocities), refine

    def predict(self, x: Tensor, t: float) -> Tensor:
        if not self._unread:
            raise _VelocityNeeded(x, t)
        return self._unread.pop(0)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        if self._refine is None:
            raise ValueError("this plan has refiner steps: give accelerate a refiner")
        return self._refine(x, -t, v)


def predictor_calls(steps: Sequence[Step], times: Sequence[float]) -> list[Point]:
    """Every predictor call of the steps on this grid, in order."""
    points: list[Point] = []

    class CallRecorder(Field):
        def predict(self, x: Tensor, t: float) -> Tensor:
            points.append(Point(number, t))
            return x

        def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
            return v

    state = State(torch.zeros(1))
    for number, step in enumerate(steps):
        state = step(CallRecorder(), state, times[number], times[number + 1])
    return points


class Run:
    """One pass through a plan, from its call `first` on.

    It takes velocities one by one, and says where the next one must be evaluated: at `position`.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        times: Sequence[float],
        calls: Sequence[Point],
        first: int,
        x: Tensor,
    ) -> None:
        self.steps, self.times = steps, times
        self.step, time = calls[first]
        # A run that starts within a step has no earlier velocity of it. The velocity that comes is
        # used as the cached one of the next step.
        self._between = time != times[self.step]
        self.state, self.position, self._known = State(x), x, list[Tensor]()
        self.returned: Tensor | None = None

    def adopt(self, sample: Tensor) -> None:
        """Apply to the state what the pipeline or a callback has changed in the latents.

        sample: the latents as the pipeline passes them to the next step.
        """
        if sample is not self.returned:
            change = sample.to(self.position.dtype) - self.position
            self.state = self.state._replace(x=self.state.x + change)

    def take(self, v: Tensor, refine: Refine | None) -> Tensor:
        """Take the velocity at `position` -> the next position, or the result."""
        if self._between:
            self.state, self.step, self._between = State(self.state.x, v), self.step + 1, False
        else:
            self._known.append(v)
        while self.step < len(self.steps):
            t0, t1 = self.times[self.step], self.times[self.step + 1]
            try:
                self.state = self.steps[self.step](
                    _KnownVelocities(self._known, refine), self.state, t0, t1
                )
            except _VelocityNeeded as request:
                self.position = request.x
                return request.x
            self.step, self._known = self.step + 1, []
        self.position = self.state.x
        return self.state.x


class _Threads:
    """Values that each thread has of its own.

    A thread that has set none reads those of the first thread.
    """

    def __init__(self) -> None:
        self.first: dict[str, Any] = {}
        self._local = threading.local()

    def mine(self) -> dict[str, Any]:
        return self._local.__dict__

    def get(self, name: str) -> Any:
        return self.mine()[name] if name in self.mine() else self.first.get(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Threads:
        threads = _Threads()
        threads.first = copy.deepcopy({**self.first, **self.mine()}, memo)
        return threads

    def __reduce__(self) -> Any:
        return _restored, ({**self.first, **self.mine()},)


def _restored(values: dict[str, Any]) -> _Threads:
    threads = _Threads()
    threads.first = values
    return threads


class _PerThread:
    """An attribute with a value for each thread.

    The stock scheduler has one value, so threads that share a pipeline would collide.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type) -> Any:
        return self if scheduler is None else scheduler._threads.get(self.name)

    def __set__(self, scheduler: Any, value: Any) -> None:
        threads = scheduler.__dict__.setdefault("_threads", _Threads())
        threads.mine()[self.name] = value
        threads.first.setdefault(self.name, value)


class PlanScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """FlowMatchEulerDiscreteScheduler with the predictor calls of a plan as its timesteps.

    plan: a Plan, or text such as "H1P5". plan_grid: the grid of a plan given as text.
    grid: "pipeline": the noise levels that the pipeline would use for as many Euler steps as the
        plan has steps, with its shift; "corrected": the same, but with the shift applied once,
        where pipelines that give no sigmas apply it twice (diffusers' issue 13243); "plan": the
        plan's own grid; "auto": the plan's if it is not uniform, else the pipeline's.
    stock: the configuration of the scheduler that it replaces.
    Raises ValueError for plans and configurations that a pipeline can't run.
    """

    timesteps, sigmas, num_inference_steps = (
        _PerThread("timesteps"),
        _PerThread("sigmas"),
        _PerThread("num_inference_steps"),
    )
    _step_index, _begin_index, _run = (
        _PerThread("_step_index"),
        _PerThread("_begin_index"),
        _PerThread("_run"),
    )
    _times = _PerThread("_times")

    def __init__(
        self,
        plan: str | Plan = "H1P5",
        grid: Grid = "auto",
        plan_grid: Sequence[float] | None = None,
        **stock: Any,
    ) -> None:
        self._run = None
        super().__init__(**stock)
        self.plan = as_plan(plan) if plan_grid is None else Plan.parse(str(plan), grid=plan_grid)
        if grid not in ("auto", "pipeline", "corrected", "plan"):
            raise ValueError(
                f"grid must be 'auto', 'pipeline', 'corrected' or 'plan', got {grid!r}"
            )
        if self.plan.start:
            raise ValueError(
                f"plan must start at 0, got {self.plan.start:g}: pipelines start later by "
                "themselves, by strength"
            )
        if self.plan.guidance_interval != (0.0, 1.0):
            raise ValueError(
                f"plan must have no guidance interval, got {self.plan.guidance_interval}: a "
                "pipeline guides by itself"
            )
        for name in ("stochastic_sampling", "invert_sigmas"):
            if self.config.get(name):
                raise ValueError(f"a scheduler with {name} can't run a plan")
        uniform = all(abs(t - i / len(self.plan)) < 1e-12 for i, t in enumerate(self.plan.grid))
        if self.plan.weights and grid not in ("auto", "plan"):
            raise ValueError(
                "grid must be 'plan' for a plan with fitted weights, which hold on its own grid "
                f"alone, got {grid!r}"
            )
        if self.plan.weights or (grid == "auto" and not uniform):
            self.grid = "plan"
        else:
            self.grid = "pipeline" if grid == "auto" else grid
        self.refiner: Refine | None = None
        self._warned = False
        self.register_to_config(plan=str(self.plan), plan_grid=list(self.plan.grid), grid=grid)

    @classmethod
    def of(cls, scheduler: Any, plan: str | Plan, grid: Grid = "auto") -> PlanScheduler:
        """A PlanScheduler with the configuration of a stock scheduler.

        Raises TypeError for a scheduler of another kind.
        """
        if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
            raise TypeError(
                "plans take the place of FlowMatchEulerDiscreteScheduler, not of "
                f"{type(scheduler).__name__}"
            )
        return cls(
            plan, grid, **{key: value for key, value in scheduler.config.items() if key in _STOCK}
        )

    @property
    def calls(self) -> int:
        """Predictor calls of a whole run (NFE)."""
        return self.plan.cost.predictor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the noise levels, as for `len(plan)` Euler steps of the stock scheduler.

        sigmas or timesteps of another number are interpolated to that number.
        """
        requested = (
            num_inference_steps
            if num_inference_steps is not None
            else len(sigmas if sigmas is not None else timesteps or ())
        )
        if requested not in (len(self.plan), self.calls) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{requested} steps were asked for: plan {self.plan} has {len(self.plan)} and "
                f"makes {self.calls} predictor calls, whatever num_inference_steps says",
                stacklevel=2,
            )
        if self.grid == "plan":
            levels = 1 - torch.tensor(self.plan.grid, dtype=torch.float64)
            self.sigmas = levels.float().to(device)
        else:
            count = len(self.plan)
            if timesteps is not None and sigmas is None:
                super().set_timesteps(device=device, mu=mu, timesteps=_resampled(timesteps, count))
            elif sigmas is not None:
                super().set_timesteps(device=device, mu=mu, sigmas=_resampled(sigmas, count))
            elif self.grid == "corrected":
                super().set_timesteps(
                    device=device, mu=mu, sigmas=list(np.linspace(1, 1 / count, count))
                )
            else:
                super().set_timesteps(count, device=device, mu=mu)
        levels = self.sigmas
        self._times = [-s for s in levels.tolist()]
        times = [p.time for p in predictor_calls(self.plan.steps, self._times)]
        self.sigmas = torch.tensor(
            [*(-t for t in times), float(levels[-1])], dtype=torch.float32, device=levels.device
        )
        self.timesteps = self.sigmas[:-1] * self.config["num_train_timesteps"]
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = self._run = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **options: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Take the output of a predictor call -> where to make the next one.

        After the last call it returns the result. sample: the latents, (N, ...).
        """
        unused = {"generator", "s_churn", "s_tmin", "s_tmax", "s_noise"}
        if args or any(value is not None for name, value in options.items() if name not in unused):
            raise ValueError(f"a plan's steps take no further arguments, got {[*args, *options]}")
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        run = self._run
        if run is None:
            self._init_step_index(timestep)  # type: ignore[arg-type]
            calls = predictor_calls(self.plan.steps, self._times)
            run = self._run = Run(self.plan.steps, self._times, calls, self._step_index, wide)
        else:
            run.adopt(sample)
        x = run.take(-model_output.to(wide.dtype), self.refiner)
        if self.refiner is not None:
            self.refiner.stepped()
        self._step_index += 1
        run.returned = x.to(model_output.dtype)
        if self._step_index == len(self.timesteps):
            self._run = None
        return (
            (run.returned,)
            if not return_dict
            else FlowMatchEulerDiscreteSchedulerOutput(prev_sample=run.returned)
        )


# diffusers reads from the signature which entries of a saved configuration are arguments.
_OURS, _STOCK = (
    inspect.signature(kind.__init__).parameters
    for kind in (PlanScheduler, FlowMatchEulerDiscreteScheduler)
)
PlanScheduler.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(p for p in _OURS.values() if p.kind is not p.VAR_KEYWORD),
        *(p for name, p in _STOCK.items() if name != "self"),
    ]
)


def _resampled(levels: Sequence[float], count: int) -> list[float]:
    """Noise levels or timesteps, interpolated to `count` steps.

    They end before 0, which is added for the interpolation and left out of the result.
    """
    knots = np.append(np.asarray(levels, dtype=np.float64), 0.0)
    if len(knots) == count + 1:
        return [float(level) for level in knots[:-1]]
    return [
        float(level)
        for level in np.interp(
            np.linspace(0, len(knots) - 1, count + 1), np.arange(len(knots)), knots
        )[:-1]
    ]
