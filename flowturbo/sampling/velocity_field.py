"""Velocity fields: models as the steps see them.

Guidance is applied here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowturbo_kernels import guide, guided_update, skip_checks

from ..models.flow_model import AdaptiveNetwork, FlowModel, Network, ReversedTime
from ..models.prompt_kind import both_halves
from ..models.prompt_network import PromptNetwork
from ..models.sit import SiT
from ..models.text_to_image import Conditions, PromptModel
from ..solver.plan import Plan
from ..solver.steps import Field, Move

_HOISTED_BYTES = 256 << 20
"""Memory for modulations: they are computed for as many times at once as fit in it."""


class GuidedField(Field):
    """A class-conditional model on one batch of labels, for any network, call by call.

    guidance: the scale, as a number or a tensor (N, 1, 1, 1); None: none.
    channels: how many channels guidance acts on.
    Under guidance every velocity has 2N rows, the conditional half first, and each half has its own
    cached velocity (public code). Outside the plan's guidance interval only the conditional half is
    evaluated, and is used for both.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        labels: Any,
        guidance: float | Tensor | None,
        channels: int,
    ) -> None:
        self.model, self.plan, self.guidance, self.channels = model, plan, guidance, channels
        self.labels: Any = labels

    @functools.cached_property
    def both_labels(self) -> Any:
        """The labels of both halves of guidance."""
        return self._with_null(self.labels)

    def _with_null(self, labels: Any) -> Any:
        """The labels of both halves."""
        return torch.cat([labels, torch.full_like(labels, self.model.null_class or 0)])

    def predict(self, x: Tensor, t: float) -> Tensor:
        network = self.model.predictor
        v = self._whole(x, self._guided(self._run(network, x, t, None), t))
        # The move after a call makes a velocity of its own; here it may be the network's buffer.
        return v if _is_ours(network) else v.clone()

    def predict_and_move(self, x: Tensor, t: float, move: Move) -> tuple[Tensor, Tensor]:
        return self._move(self._run(self.model.predictor, x, t, None), x, t, None, move)

    def refine_and_move(
        self, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move
    ) -> tuple[Tensor, Tensor]:
        return self._move(
            self._run(self._refiner(), x, t, self._read(x, t, read)), x, t, base, move
        )

    def _refiner(self) -> Network:
        if self.model.refiner is None:
            raise ValueError(
                "this plan has refiner steps, but the model was loaded without a refiner"
            )
        return self.model.refiner

    def _scale(self, t: float) -> float | Tensor | None:
        """The guidance scale at time t; None outside the guidance interval."""
        return self.guidance if self.plan.is_guided(t) else None

    def _read(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        """The rows of v (N or 2N) that a call at time t reads."""
        return v if self._scale(t) is not None else v[: len(x)]

    def _guided(self, raw: Tensor, t: float) -> Tensor:
        scale = self._scale(t)
        return raw if scale is None else guide(raw, scale, self.channels)

    def _whole(self, x: Tensor, v: Tensor) -> Tensor:
        """v with both halves, if guidance is on but only one was evaluated."""
        return torch.cat([v, v]) if self.guidance is not None and len(v) == len(x) else v

    def _move(
        self, raw: Tensor, x: Tensor, t: float, base: Tensor | None, move: Move
    ) -> tuple[Tensor, Tensor]:
        """Apply guidance, add `base` and move, in one operation -> (the new x, v).

        raw: the output of a network.
        """
        base = None if base is None else self._read(x, t, base)
        scale = self._scale(t)
        moved, v = guided_update(
            move.origin, raw, scale, self.channels, move.weight, base, move.velocities, move.weights
        )
        return moved, self._whole(x, v)

    def _run(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        """The output of a network, N rows, or 2N with guidance, in float32 or wider.

        x: (N, C, H, W). v: as many rows as the output; for a refiner.
        """
        dtype = self.model.dtype
        rows, times, labels = self._inputs(x, t)
        given: tuple[Any, ...] = rows, labels, v
        if not _is_ours(network):
            given = tuple(g.clone() if isinstance(g, Tensor) else g for g in given)
        rows, labels, v = given
        out = network(rows.to(dtype), times, labels, None if v is None else v.to(dtype))
        return out.to(torch.promote_types(x.dtype, times.dtype))

    def _inputs(self, x: Tensor, t: float) -> tuple[Tensor, Tensor, Any]:
        """x, times and labels of a call at time t, N rows, or 2N with guidance."""
        guided = self._scale(t) is not None
        rows = torch.cat([x, x]) if guided else x
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        times = torch.full((len(rows),), t, dtype=dtype, device=x.device)
        return rows, times, self.both_labels if guided else self.labels


class HoistedField(GuidedField):
    """GuidedField for SiTs, with everything that does not depend on x hoisted out of the steps.

    adaLN's modulations depend only on time and label, and a plan fixes all times. So they are
    computed in advance, for many times together, and once for all images for the null class. x is
    embedded once for both halves of guidance. On a GPU a call and the move after it are
    SiT.evaluate_and_move.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        labels: Tensor,
        guidance: float | Tensor | None,
        channels: int,
    ) -> None:
        super().__init__(model, plan, labels, guidance, channels)
        null = None if guidance is None else model.null_class
        self._modulations = {
            id(network): _Modulations(
                network,
                [c.t for c in plan.calls if c.refiner == refines],
                labels,
                null,
                model.dtype,
            )
            for network, refines in ((model.predictor, False), (model.refiner, True))
            if isinstance(network, AdaptiveNetwork)
        }

    def predict_and_move(self, x: Tensor, t: float, move: Move) -> tuple[Tensor, Tensor]:
        if not _fused(self.model.predictor, x):
            return super().predict_and_move(x, t, move)
        return self._evaluate_and_move(self.model.predictor, x, t, move)

    def predict_ahead_and_move(
        self, ahead: Move, v0: Tensor, t: float, move: Move
    ) -> tuple[Tensor, Tensor]:
        x = ahead.origin
        if ahead.velocities or not _fused(self.model.predictor, x):
            return super().predict_ahead_and_move(ahead, v0, t, move)
        step = v0, ahead.weight
        return self._evaluate_and_move(self.model.predictor, x, t, move, ahead=step)

    def refine_and_move(
        self, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move
    ) -> tuple[Tensor, Tensor]:
        refiner = self._refiner()
        if not _fused(refiner, x):
            return super().refine_and_move(x, t, read, base, move)
        v, base = self._read(x, t, read), self._read(x, t, base)
        return self._evaluate_and_move(refiner, x, t, move, v=v, base=base)

    def _evaluate_and_move(
        self, network: Network, x: Tensor, t: float, move: Move, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(network, SiT | ReversedTime)
        scale = self._scale(t)
        modulations = self._modulations[id(network)].at(t, scale is not None)
        with skip_checks():  # `sample` has checked the shape of x
            moved, v = network.evaluate_and_move(x, modulations, move, scale, self.channels, **rest)
        return moved, self._whole(x, v)

    def _run(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        assert isinstance(network, AdaptiveNetwork)
        modulations = self._modulations[id(network)].at(t, self._scale(t) is not None)
        if not _is_ours(network):
            x, v = x.clone(), None if v is None else v.clone()
        with skip_checks():  # `sample` has checked the shape of x
            out = network.evaluate(x, modulations, v)
        return out.to(
            torch.promote_types(x.dtype, torch.promote_types(self.model.dtype, torch.float32))
        )


class PromptField(GuidedField):
    """GuidedField for text-to-image models, whose labels are conditions by name.

    Those of the second half are named negative_...
    """

    def __init__(
        self,
        model: PromptModel,
        plan: Plan,
        conditions: Conditions,
        guidance: float | Tensor | None,
        channels: int,
    ) -> None:
        self.conditions, self.kind = conditions, model.kind
        positive = {k: v for k, v in conditions.items() if not k.startswith("negative_")}
        super().__init__(model, plan, positive, guidance, channels)

    def _with_null(self, labels: Any) -> Any:
        return both_halves(
            labels, {k: self.conditions.get(f"negative_{k}", v) for k, v in labels.items()}
        )

    def _guided(self, raw: Tensor, t: float) -> Tensor:
        scale = self._scale(t)
        return raw if scale is None else self._both_guided(raw, scale)

    def _both_guided(self, raw: Tensor, scale: float | Tensor) -> Tensor:
        """Both halves guided, and rescaled as the model's pipeline does."""
        # The axes between channels and width are one to the kernel.
        guided = guide(raw.flatten(2, -2), scale, self.channels).reshape(raw.shape)
        if not self.kind.rescales:
            return guided
        rescaled = self.kind.rescale(guided.chunk(2)[0], raw.chunk(2)[0])
        return torch.cat([rescaled, rescaled])

    def _move(
        self, raw: Tensor, x: Tensor, t: float, base: Tensor | None, move: Move
    ) -> tuple[Tensor, Tensor]:
        scale, kind = self._scale(t), self.kind
        if x.ndim == 4 and (scale is None or not kind.rescales):
            return super()._move(raw, x, t, base, move)
        # A refiner's offset is guided as a part of the velocity that it makes.
        v = raw if base is None else self._read(x, t, base) + raw
        v = v if scale is None else self._both_guided(v, scale)
        return move.by(v), self._whole(x, v)

    def _run(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        answers = network.at(t) if isinstance(network, PromptNetwork) else network
        return super()._run(answers, x, t, v)


def field_of(
    model: FlowModel,
    plan: Plan,
    conditions: Conditions,
    guidance: float | Tensor | None,
    channels: int,
) -> GuidedField:
    """The fastest field for the model's networks.

    conditions: labels (N,), or those of a text-to-image model. The rest: as for GuidedField.
    """
    if isinstance(model, PromptModel):
        return PromptField(model, plan, conditions, guidance, channels)
    labels = conditions["labels"]
    networks = [model.predictor] + ([] if model.refiner is None else [model.refiner])
    hoisted = all(isinstance(network, AdaptiveNetwork) for network in networks)
    return (HoistedField if hoisted else GuidedField)(model, plan, labels, guidance, channels)


def _is_ours(network: Network) -> bool:
    """Whether a network is known to leave its inputs, and to return another tensor at every call.

    Others may write to what they are given, or return one buffer at every call, as compiled ones
    do that replay a CUDA graph. They get copies. What a step keeps is another tensor anyway.
    """
    return type(network) in (SiT, ReversedTime) or isinstance(network, PromptNetwork)


def _fused(network: Network, at: Tensor) -> bool:
    """Whether a network's call is one with what goes before and after it: on a GPU, for a SiT as it
    was made. On the CPU that would only be slower.
    """
    sit = network.network if type(network) is ReversedTime else network
    return _on_gpu(at) and isinstance(sit, SiT) and sit.has_own_conditioning()


def _on_gpu(at: Tensor) -> bool:
    return at.is_cuda


class _Modulations:
    """The modulations of one network for a batch of labels, at the times of a plan.

    labels: (N,).
    null: the class of the second half of guidance, whose rows follow those of the labels, or None.
    """

    def __init__(
        self,
        network: AdaptiveNetwork,
        times: Sequence[float],
        labels: Tensor,
        null: int | None,
        dtype: torch.dtype,
    ) -> None:
        self.network, self.labels, self.null = network, labels, null
        self.wide = torch.promote_types(dtype, torch.float32)
        self.times = list(dict.fromkeys(times))
        self._by_time: dict[float, list[Tensor]] = {}
        rows = len(labels) * (1 if null is None or _fused(network, labels) else 2)
        size = max(1, rows * network.modulation_width * dtype.itemsize)
        self._chunk = max(1, _HOISTED_BYTES // size)  # how many times are computed at once

    def at(self, t: float, guided: bool) -> list[Tensor]:
        """The modulations at time t: (N, 6D) per block, (N, 2D) for the final layer.

        With guidance 2N rows, or, where the network reads the null class by its index, N + 1.
        """
        if t not in self._by_time:
            self._by_time = {}  # freed before the next ones are computed
            first = self.times.index(t)
            times = self.times[first : first + self._chunk]
            compute = self._by_index if _fused(self.network, self.labels) else self._by_row
            layers = compute(times)
            self._by_time = {time: [m[s] for m in layers] for s, time in enumerate(times)}
        both = self._by_time[t]
        return both if guided or self.null is None else [m[: len(self.labels)] for m in both]

    def _by_index(self, times: list[float]) -> list[Tensor]:
        """Those of many times, (S, N or N + 1, ...), the null class's row once."""
        assert isinstance(self.network, SiT | ReversedTime)
        with skip_checks():
            return self.network.modulations_at(times, self.labels, self.null)

    def _by_row(self, times: list[float]) -> list[Tensor]:
        """Those of many times, (S, N or 2N, ...)."""
        N = len(self.labels)
        # Filled on the device: a copy from the host can't be captured.
        t = torch.cat(
            [torch.full((1,), time, dtype=self.wide, device=self.labels.device) for time in times]
        )
        y = (
            self.labels
            if self.null is None
            else torch.cat([self.labels, self.labels.new_full((1,), self.null)])
        )
        layers = self.network.modulations(self.network.condition(t, y))
        if self.null is None:
            return layers
        return [torch.cat([m[:, :N], m[:, N:].expand(-1, N, -1)], dim=1) for m in layers]
