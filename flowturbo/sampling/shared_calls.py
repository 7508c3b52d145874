"""Network calls that plans share."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.flow_model import FlowModel, Network
from ..solver.plan import Plan
from .velocity_field import GuidedField

LIMIT = 512 << 20
"""Memory for outputs that are kept, in bytes; those unused for the longest time are dropped."""


class SharedCalls:
    """Outputs of networks by what went in, bit for bit.

    Plans that begin alike from the same noise make the same calls: all of them share the call at
    t = 0, and plans on one grid share as many more as they have steps in common. What comes out is
    what the network would return again, so results do not depend on what is kept.
    made, shared: how many calls ran and how many were saved, both times images. A refiner's call
        counts as its share of the predictor's multiply-accumulates.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self.made = self.shared = 0.0
        self._outputs: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def __call__(self, key: tuple[Any, ...], cost: float, run: Callable[[], Tensor]) -> Tensor:
        """The output that is kept under a key, else that of `run`. cost: in calls times images."""
        if key in self._outputs:
            self._outputs.move_to_end(key)
            self.shared += cost
            return self._outputs[key]
        out = run().clone()  # some networks return one buffer at every call
        self.made += cost
        self._outputs[key] = out
        self.size += out.nbytes
        while self.size > self.limit:
            self.size -= self._outputs.popitem(last=False)[1].nbytes
        return out


class SharedField(GuidedField):
    """GuidedField whose calls are shared with other plans on the same labels.

    batch: a name of the labels.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        labels: Tensor,
        guidance: float | None,
        calls: SharedCalls,
        batch: str,
    ) -> None:
        super().__init__(model, plan, labels, guidance, model.guidance_channels)
        self.calls, self.batch = calls, batch

    def _run(self, network: Network, x: Tensor, t: float, v: Tensor | None) -> Tensor:
        refines = v is not None
        guided = self._scale(t) is not None
        key = (self.batch, refines, t, guided, _digest(x), _digest(v))
        share = 0.5 if self.guidance is not None and not guided else 1.0
        if refines and self.model.macs:
            share *= self.model.macs[1] / self.model.macs[0]
        return self.calls(
            key, share * len(x), lambda: super(SharedField, self)._run(network, x, t, v)
        )


def _digest(x: Tensor | None) -> bytes:
    if x is None:
        return b""
    values = x.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=16).digest()
