"""Fields: what the steps ask, answered by a model. Guidance is applied here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowturbo_kernels import guide

from .models import FlowModel, Network, VelocityFunction
from .plan import Plan


class GuidedField:
    """A class-conditional model for one batch of labels.

    Under guidance every velocity has 2N rows, the conditional half first, each half with its own cache (public code). Outside the
    plan's guidance interval only the conditional half is evaluated and stands for both.
    """

    def __init__(self, model: FlowModel, plan: Plan, labels: Tensor, guidance: float, channels: int) -> None:
        self.model, self.plan, self.guidance, self.channels = model, plan, guidance, channels
        self.labels = labels
        self.both_labels = labels if guidance == 1 else torch.cat([labels, torch.full_like(labels, model.null_class or 0)])

    def predict(self, x: Tensor, t: float) -> Tensor:
        return self._evaluate(self.model.predictor, x, t, None)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        if self.model.refiner is None:
            raise ValueError("this plan has refiner steps, but the model was loaded without a refiner")
        return self._evaluate(self.model.refiner, x, t, v)

    def _evaluate(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        if self.guidance == 1:
            return self._run(network, x, t, self.labels, v)
        if not self.plan.is_guided(t):
            conditional = self._run(network, x, t, self.labels, None if v is None else v[: len(x)])
            return torch.cat([conditional, conditional])
        both = self._run(network, torch.cat([x, x]), t, self.both_labels, v)
        return guide(both, self.guidance, self.channels)

    def _run(self, network: Network, x: Tensor, t: float, labels: Tensor, v: Tensor | None) -> Tensor:
        """In the model's dtype; the state of the solver stays in float32 or wider."""
        dtype, wide = self.model.dtype, torch.promote_types(self.model.dtype, torch.float32)
        times = torch.full((len(x),), t, dtype=wide, device=x.device)
        out = network(x.to(dtype), times, labels, None if v is None else v.to(dtype))
        return out.to(torch.promote_types(x.dtype, wide))


class FunctionField:
    """Any callable v(x, t, **cond) as a field: no guidance, no refiner."""

    def __init__(self, function: VelocityFunction, cond: dict[str, Any]) -> None:
        self.function, self.cond = function, cond

    def predict(self, x: Tensor, t: float) -> Tensor:
        return self.function(x, torch.tensor(t, dtype=x.dtype, device=x.device), **self.cond)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        raise ValueError("this plan has refiner steps, but a plain function has no refiner")
