"""A plan as a sampler in k-diffusion's convention, in which ComfyUI samples too.

There a model returns the denoised state D, at a noise level sigma = 1 - t. The velocity,
data - noise, is then (D - x) / sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..solver.plan import Plan, as_plan
from ..solver.steps import Field, State

Denoiser = Callable[..., Tensor]
"""D(x, sigma, **extra_args): x (N, ...), sigma (N,) -> the denoised x, like x."""
Callback = Callable[[dict[str, Any]], object]

_EQUAL = 1e-5
"""By how much levels in float32 may differ from a plan's own."""


class PlanSampler:
    """A plan, to be called as k-diffusion's sample_euler is, for a flow model.

    plan: a Plan, its text, or the name of its file. Of its grid only the number of steps counts:
    the noise levels are those of the call. Fitted weights hold on the plan's grid alone, so there
    the levels must be its own.
    Raises ValueError for refiner steps and for a guidance interval: the models of k-diffusion have
    no refiner, and are guided already.
    """

    def __init__(self, plan: str | Plan) -> None:
        self.plan = as_plan(plan)
        self.__name__ = f"flowturbo_{self.plan}"
        if self.plan.cost.refiner:
            raise ValueError(
                f"plan {self.plan} has refiner steps, and a sampler has no refiner: take a plan "
                "without R, S and M, such as 'A7'"
            )
        if self.plan.guidance_interval != (0.0, 1.0):
            raise ValueError(
                f"plan must have no guidance interval, got {self.plan.guidance_interval}: the "
                "model of a sampler is guided already"
            )

    @torch.no_grad()
    def __call__(
        self,
        model: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Sample from x at sigmas[0] to sigmas[-1], one step of the plan each -> like x.

        x: (N, ...), floating point, of the noise level sigmas[0]. The state is kept in float32 or
            wider.
        sigmas: one level more than the plan has steps, from at most 1 strictly down to at least 0.
        extra_args: of the model.
        callback: called in each step, after its first model call, with a dict of its number i, and
            x, sigma, sigma_hat and denoised of that call.
        disable: whether to show no bar of steps.
        Raises ValueError for other sigmas, and for a plan that calls the model at level 0, where
        the denoised x says nothing of the velocity.
        """
        levels = self._checked(sigmas)
        times = [1 - level for level in levels]  # exact: the levels are of float32
        steps = self._on(times).steps
        field = _Denoised(model, dict(extra_args or {}), x.dtype, callback)
        state = State(x.to(torch.promote_types(x.dtype, torch.float32)))
        for i, step in enumerate(tqdm(steps, disable=disable, unit="step", leave=False)):
            field.started = i
            state = step(field, state, times[i], times[i + 1])
        return state.x.to(x.dtype)

    def _checked(self, sigmas: Tensor) -> list[float]:
        plan, count = self.plan, len(self.plan) + 1
        if sigmas.ndim != 1 or len(sigmas) != count:
            raise ValueError(
                f"plan {plan} has {len(plan)} steps and needs {count} sigmas, got "
                f"{tuple(sigmas.shape)}: give the scheduler {len(plan)} steps"
            )
        levels: list[float] = sigmas.float().tolist()
        if not (levels[0] <= 1 + _EQUAL and levels[-1] >= 0):
            raise ValueError(
                "sigmas must be noise levels of a flow model, from at most 1 to at least 0, got "
                f"{levels[0]:g} to {levels[-1]:g}"
            )
        for i in range(len(plan)):
            if not levels[i] > levels[i + 1]:  # also catches NaN
                raise ValueError(
                    f"sigmas must fall strictly, but sigmas[{i}] = {levels[i]:g} is followed by "
                    f"{levels[i + 1]:g}"
                )
        if levels[-1] == 0 and any(call.t >= 1 for call in plan.calls):
            raise ValueError(
                f"plan {plan} ends with a model call at noise level 0, where a denoised image "
                "says nothing of the velocity: end it in a one-call step, as H1P4E1 or A7 do"
            )
        return levels

    def _on(self, times: list[float]) -> Plan:
        """The plan, whose weights hold at these times."""
        if not self.plan.weights:
            return self.plan
        own = self.plan if times[0] <= 0 else self.plan.starting_at(times[0])
        if any(abs(a - b) > _EQUAL for a, b in zip(own.grid, times, strict=True)):
            raise ValueError(
                f"plan {self.plan} has fitted weights, which hold at its own noise levels alone: "
                f"sigmas must be {', '.join(f'{1 - t:.4g}' for t in own.grid)}"
            )
        return own


class _Denoised(Field):
    """A denoiser as a velocity field.

    started: the number of the step, if the callback has not seen it yet.
    """

    def __init__(
        self,
        model: Denoiser,
        extra_args: dict[str, Any],
        dtype: torch.dtype,
        callback: Callback | None,
    ) -> None:
        self.model, self.extra_args, self.dtype, self.callback = model, extra_args, dtype, callback
        self.started: int | None = None

    def predict(self, x: Tensor, t: float) -> Tensor:
        sigma, given = 1 - t, x.to(self.dtype)
        levels = given.new_full((len(x),), sigma)
        denoised = self.model(given, levels, **self.extra_args)
        if self.callback is not None and self.started is not None:
            seen = {"x": given, "i": self.started, "sigma": levels[0], "sigma_hat": levels[0]}
            self.callback({**seen, "denoised": denoised})
        self.started = None
        return (denoised.to(x.dtype) - x) / sigma
