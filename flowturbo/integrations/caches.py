"""Caches of other libraries in a network, which skip parts of calls, and hooks that move it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

Hooks = Sequence[tuple[str, Any]]


def counting_cache(network: nn.Module, hooks: Hooks | None = None) -> str | None:
    """What in this network counts calls or compares them, so that a call depends on earlier ones.

    Caches of diffusers, cache-dit, ParaAttention and TeaCache are known. None: nothing.
    hooks: those of `hooks_of`, where they were looked for already.
    """
    config = getattr(network, "_cache_config", None)
    if config is not None:
        return f"diffusers' {type(config).__name__.removesuffix('Config')}"
    if getattr(network, "_is_cached", False):
        return "a cache of cache-dit or ParaAttention"
    if getattr(network, "enable_teacache", False):
        return "TeaCache"
    hooks = hooks_of(network) if hooks is None else hooks
    return next((f"diffusers' hook {name}" for name, hook in hooks if hook._is_stateful), None)


def moved_weights(network: nn.Module, hooks: Hooks) -> str | None:
    """What moves or casts the weights of this network in every call; None: nothing.

    hooks: those of `hooks_of`.
    """
    if hasattr(network, "_hf_hook"):
        return "accelerate's hook, as for offloading,"
    moving = ("group_offloading", "layerwise_casting")
    return next(
        (f"diffusers' hook {name}" for name, _ in hooks if name.startswith(moving)),
        None,
    )


def hooks_of(network: nn.Module) -> list[tuple[str, Any]]:
    """The hooks of diffusers on a network and its parts, by name."""
    # Walked by hand: network.modules() takes four times as long, before every call.
    found: list[tuple[str, Any]] = []
    stack: list[nn.Module | None] = [network]
    while stack:
        module = stack.pop()
        if module is not None:
            if "_diffusers_hook" in module.__dict__:
                found += module.__dict__["_diffusers_hook"].hooks.items()
            stack += module._modules.values()
    return found
