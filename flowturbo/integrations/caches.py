"""Caches of other libraries in a network, which skip parts of calls, and hooks that move it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def counting_cache(network: nn.Module) -> str | None:
    """What in this network counts calls or compares them, so that a call depends on earlier ones.

    Caches of diffusers, cache-dit, ParaAttention and TeaCache are known. None: nothing.
    """
    config = getattr(network, "_cache_config", None)
    if config is not None:
        return f"diffusers' {type(config).__name__.removesuffix('Config')}"
    if getattr(network, "_is_cached", False):
        return "a cache of cache-dit or ParaAttention"
    if getattr(network, "enable_teacache", False):
        return "TeaCache"
    return next(
        (f"diffusers' hook {name}" for name, hook in hooks_of(network) if hook._is_stateful), None
    )


def moved_weights(network: nn.Module) -> str | None:
    """What moves or casts the weights of this network in every call; None: nothing."""
    if hasattr(network, "_hf_hook"):
        return "accelerate's hook, as for offloading,"
    moving = ("group_offloading", "layerwise_casting")
    return next(
        (f"diffusers' hook {name}" for name, _ in hooks_of(network) if name.startswith(moving)),
        None,
    )


def hooks_of(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks of diffusers on a network and its parts, by name."""
    for module in network.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        if registry is not None:
            yield from registry.hooks.items()
