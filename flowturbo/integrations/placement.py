"""Where a refiner's weights lie: beside the latents of a pipeline whose own may be offloaded."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ..models.pipelines import move_part
from .caches import hooks_of

_PLACING = threading.Lock()
"""Threads that share a pipeline share its refiner."""


def place(refiner: nn.Module, device: torch.device, network: Any) -> None:
    """Bring a refiner to a device and into a network's dtype, in place and only if it differs.

    device: where the pipeline runs; meta: not known yet, and the refiner stays where it is.
    A refiner that is offloaded itself is left to the hooks that move it.
    Raises ValueError for one without weights.
    """
    if _offloaded(refiner):
        return
    weights = [*refiner.parameters(), *refiner.buffers()]
    if any(tensor.is_meta for tensor in weights):
        raise ValueError(
            f"refiner must have its weights, got a {type(refiner).__name__} on the meta device: "
            "load it again"
        )
    if device.type == "meta":
        device = weights[0].device
    dtype = network.dtype
    # Weights that were moved in inference mode could not be trained any more.
    with _PLACING, torch.inference_mode(False):
        if refiner.dtype != dtype or any(tensor.device != device for tensor in weights):
            move_part(refiner, device, dtype)


def _offloaded(module: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move its weights to where it is called."""
    return hasattr(module, "_hf_hook") or any(
        name.startswith("group_offloading") for name, _ in hooks_of(module)
    )
