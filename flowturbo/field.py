"""Fields: what the steps ask, answered by a model. Guidance is applied here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from flowturbo_kernels import guide, guided_update, refiner_forward, trusted

from .models import AdaptiveNetwork, FlowModel, Network, VelocityFunction
from .models.prompted import Conditions, PromptModel
from .models.sit import SiT
from .plan import Part, Plan
from .steps import Field, Move

_HOISTED_BYTES = 256 << 20
"""Modulations of so many times at once as fit in this; a later stretch of times takes the place of the one before."""


class GuidedField(Field):
    """A class-conditional model for one batch of labels, evaluated call by call: the plain path, for any network.

    guidance: a number, a tensor (N, 1, 1, 1), or None for none. Under guidance every velocity has 2N rows, the conditional half
    first, each half with its own cache (public code). Outside the plan's guidance interval only the conditional half is evaluated
    and stands for both. In plans with X steps 2N more rows follow, both halves as they were before guidance: those are what an
    extrapolating refiner reads and corrects, so that it need not know the scale.
    """

    keeps = False
    """Whether velocities have those rows."""

    def __init__(self, model: FlowModel, plan: Plan, labels: Tensor, guidance: float | Tensor | None, channels: int) -> None:
        self.model, self.plan, self.guidance, self.channels = model, plan, guidance, channels
        self.labels: Any = labels
        self.both_labels: Any = labels if guidance is None else torch.cat([labels, torch.full_like(labels, model.null_class or 0)])
        self.keeps = guidance is not None and plan.cost.extrapolator > 0

    def predict(self, x: Tensor, t: float) -> Tensor:
        return self._finished(x, t, self._run(self.model.predictor, x, t, None))

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        return self._finished(x, t, self._run(self._network("refiner"), x, t, self._read(x, t, v)))

    def correct(self, x: Tensor, t: float, v: Tensor, change: Tensor) -> Tensor:
        return self._finished(x, t, self._run(self._network("extrapolator"), x, t, self._unguided(x, t, v, change)))

    def predict_and_move(self, x: Tensor, t: float, move: Move) -> tuple[Tensor, Tensor]:
        return self._move(self._run(self.model.predictor, x, t, None), x, t, None, move)

    def refine_and_move(self, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        return self._refined(self._network("refiner"), x, t, self._read(x, t, read), base, move)

    def correct_and_move(self, x: Tensor, t: float, v: Tensor, change: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        return self._refined(self._network("extrapolator"), x, t, self._unguided(x, t, v, change), v, move)

    def _refined(self, network: Network, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        return self._move(self._run(network, x, t, read), x, t, base, move)

    def _network(self, part: Part) -> Network:
        self.model.allow(self.plan)
        return cast(Network, getattr(self.model, part))

    def _scale(self, t: float) -> float | Tensor | None:
        """Guidance at time t."""
        return self.guidance if self.plan.is_guided(t) else None

    def _read(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        """The rows of v (N or 2N) that a call at time t reads."""
        return v[: len(x) if self._scale(t) is None else 2 * len(x)]

    def _unguided(self, x: Tensor, t: float, *velocities: Tensor) -> Tensor:
        """The same rows of velocities as they were before guidance, channel after channel."""
        first = 2 * len(x) if self.keeps else 0
        return torch.cat([self._read(x, t, v[first:]) for v in velocities], dim=1)

    def _finished(self, x: Tensor, t: float, raw: Tensor) -> Tensor:
        """A velocity or an offset of a network's output."""
        scale = self._scale(t)
        return self._whole(x, raw if scale is None else guide(raw, scale, self.channels), raw)

    def _whole(self, x: Tensor, v: Tensor, raw: Tensor) -> Tensor:
        """v and, where they are kept, its halves before guidance, each twice if it stands for both."""
        parts = [v, raw] if self.keeps else [v]
        if self.guidance is not None and len(v) == len(x):
            parts = [half for part in parts for half in (part, part)]
        return torch.cat(parts) if len(parts) > 1 else v

    def _move(self, raw: Tensor, x: Tensor, t: float, base: Tensor | None, move: Move) -> tuple[Tensor, Tensor]:
        """Guidance, base and move in one operation."""
        known = None if base is None else self._read(x, t, base)
        scale = self._scale(t)
        moved, v = guided_update(move.origin, raw, scale, self.channels, move.weight, known, move.velocities, move.weights)
        if self.keeps and base is not None:
            raw = raw + self._unguided(x, t, base)
        return moved, self._whole(x, v, raw)

    def _run(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        """The network's output, with as many rows as it has labels, in the solver's dtype, which is float32 or wider."""
        dtype, wide = self.model.dtype, torch.promote_types(self.model.dtype, torch.float32)
        guided = self._scale(t) is not None
        labels = self.both_labels if guided else self.labels
        both = torch.cat([x, x]) if guided else x
        times = torch.full((len(both),), t, dtype=wide, device=x.device)
        out = network(both.to(dtype), times, labels, None if v is None else v.to(dtype))
        return out.to(torch.promote_types(x.dtype, wide))


class HoistedField(GuidedField):
    """The same for SiTs, with what does not depend on x taken out of the steps.

    adaLN's modulations depend on time and label alone, and a plan fixes all times: they are made before they are needed, by one
    product a layer for all times at once, and the null class's once for all images. x is embedded once for both halves of
    guidance. Where kernels run, a refiner call is flowturbo_kernels.refiner_forward.
    """

    def __init__(self, model: FlowModel, plan: Plan, labels: Tensor, guidance: float | Tensor | None, channels: int) -> None:
        super().__init__(model, plan, labels, guidance, channels)
        null = None if guidance is None else model.null_class
        parts = {part: getattr(model, part) for part in get_args(Part)}
        self._modulations = {
            id(network): _Modulations(network, [c.t for c in plan.calls if c.network == part], labels, null, model.dtype)
            for part, network in parts.items()
            if isinstance(network, AdaptiveNetwork)
        }
        self._weights = {
            id(network): network.refiner_weights()
            for part, network in parts.items()
            if part != "predictor" and isinstance(network, SiT)
        }

    def _refined(self, network: Network, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        weights = self._weights.get(id(network))
        # The CPU's references would only take longer in one piece, and that piece gives no velocity from before guidance.
        if weights is None or not x.is_cuda or self.keeps:
            return super()._refined(network, x, t, read, base, move)
        modulations = self._modulations[id(network)].at(t, self._scale(t) is not None)
        moved, v = refiner_forward(
            weights, modulations, x, read, self._scale(t), self.channels, move.weight,
            move.origin, self._read(x, t, base), move.velocities, move.weights,
        )  # fmt: skip
        return moved, self._whole(x, v, v)

    def _run(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        assert isinstance(network, AdaptiveNetwork)
        modulations = self._modulations[id(network)].at(t, self._scale(t) is not None)
        with trusted():  # x is of the model's shape: `sample` has seen to that
            out = network.evaluate(x, modulations, v)
        return out.to(torch.promote_types(x.dtype, torch.promote_types(self.model.dtype, torch.float32)))


class PromptField(GuidedField):
    """The same for text-to-image models, whose labels are conditions by name; those of the second half are named negative_..."""

    def __init__(
        self, model: FlowModel, plan: Plan, conditions: Conditions, guidance: float | Tensor | None, channels: int
    ) -> None:
        self.model, self.plan, self.guidance, self.channels = model, plan, guidance, channels
        self.labels = {name: value for name, value in conditions.items() if not name.startswith("negative_")}
        self.both_labels = self.labels
        if guidance is not None:
            self.both_labels = {k: torch.cat([v, conditions.get(f"negative_{k}", v)]) for k, v in self.labels.items()}


def field_of(model: FlowModel, plan: Plan, conditions: Conditions, guidance: float | Tensor | None, channels: int) -> GuidedField:
    """The fastest field that the model's networks allow. conditions: labels (N,), or those of a text-to-image model."""
    if isinstance(model, PromptModel):
        return PromptField(model, plan, conditions, guidance, channels)
    labels = conditions["labels"]
    hoisted = all(isinstance(network, AdaptiveNetwork) for network in model.networks())
    return (HoistedField if hoisted else GuidedField)(model, plan, labels, guidance, channels)


class _Modulations:
    """Modulations of one network for a batch of labels at all times of a plan, a stretch of times at once.

    labels (N,); null: the class of the second half of guidance, whose rows follow those of the labels, or None.
    """

    def __init__(
        self, network: AdaptiveNetwork, times: Sequence[float], labels: Tensor, null: int | None, dtype: torch.dtype
    ) -> None:
        self.network, self.labels, self.null = network, labels, null
        self.wide = torch.promote_types(dtype, torch.float32)
        self.times = list(dict.fromkeys(times))
        self._made: dict[float, list[Tensor]] = {}
        self._stretch = 0  # times made at once; the first one tells how large it is

    def at(self, t: float, guided: bool) -> list[Tensor]:
        """(N, 6D) for each block and (N, 2D) for the final layer, or with guidance 2N rows."""
        if t not in self._made:
            first, known = self.times.index(t), self._stretch > 0
            self._made = {}  # before the next ones take memory
            self._make(first, max(1, self._stretch))
            if not known:
                size = sum(m.numel() * m.element_size() for m in self._made[t])
                self._stretch = max(1, _HOISTED_BYTES // max(1, size))
                self._make(first + 1, self._stretch - 1)
        both = self._made[t]
        return both if guided or self.null is None else [m[: len(self.labels)] for m in both]

    def _make(self, first: int, count: int) -> None:
        times, N = self.times[first : first + count], len(self.labels)
        if not times:
            return
        # Filled on the device: a copy from the host would end a capture.
        t = torch.cat([torch.full((1,), time, dtype=self.wide, device=self.labels.device) for time in times])
        y = self.labels if self.null is None else torch.cat([self.labels, self.labels.new_full((1,), self.null)])
        layers = self.network.modulations(self.network.condition(t, y))
        if self.null is not None:
            layers = [torch.cat([m[:, :N], m[:, N:].expand(-1, N, -1)], dim=1) for m in layers]
        self._made |= {time: [m[s] for m in layers] for s, time in enumerate(times)}


class FunctionField(Field):
    """Any callable v(x, t, **cond) as a field: no guidance, no refiner."""

    def __init__(self, function: VelocityFunction, cond: dict[str, Any]) -> None:
        self.function, self.cond = function, cond

    def predict(self, x: Tensor, t: float) -> Tensor:
        return self.function(x, torch.tensor(t, dtype=x.dtype, device=x.device), **self.cond)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        raise ValueError("this plan has refiner steps, but a plain function has no refiner")
