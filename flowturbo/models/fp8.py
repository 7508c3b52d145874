"""A linear layer in fp8, which casts of its model leave in fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo_kernels import linear_fp8, quantize_rows
from flowturbo_kernels.linear import Activation

KINDS = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}
"""dtypes that mean something together only: a weight without its scale's whole precision is another
weight.
"""
_BITS = {torch.float8_e4m3fn: torch.uint8, torch.float32: torch.int32}


class Fp8Linear(nn.Module):
    """A linear layer whose weight is kept in fp8 (e4m3), with one scale an output, and whose input
    is quantised row by row.

    It moves as other layers do. Casts of a model that holds it, `to(dtype)` and the like, reach its
    bias alone.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype. TypeError where weight or scale were cast, past this
        class, to another dtype.
        """
        if self.weight.dtype != KINDS["weight"] or self.weight_scale.dtype != KINDS["weight_scale"]:
            # Asked here, not only by the operation's own checks: whoever trusts its arguments
            # leaves those out.
            raise TypeError(
                f"a layer in fp8 must have {_described(KINDS)}, got {_described(self._kinds())}: "
                "was it cast?"
            )
        return linear_fp8(x, self.weight, self.weight_scale, self.bias, activation)

    def _kinds(self) -> dict[str, torch.dtype]:
        return {name: getattr(self, name).dtype for name in KINDS}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """What to(), half(), cuda() and all others go through. They cast no integers, so weight and
        scale are shown as such.
        """

        def moved(t: Tensor) -> Tensor:
            if (t is not self.weight and t is not self.weight_scale) or t.dtype not in _BITS:
                return fn(t)
            bits = t.view(_BITS[t.dtype])
            result = fn(bits)
            if result is bits:
                return t
            if result.dtype != bits.dtype:  # by type(), which casts integers too
                result = bits.to(result.device)
            return result.view(t.dtype)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Refuses other dtypes, which would be copied in silently, weights without their scales
        among them.
        """
        errors: list[str] = rest[-1]
        for name, kind in KINDS.items():
            given = state.get(prefix + name)
            if given is not None and given.dtype != kind:
                errors.append(
                    f"{prefix}{name} must be {kind}, of a layer in fp8, got {given.dtype}"
                )
        super()._load_from_state_dict(state, prefix, *rest)


def _described(kinds: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())
