"""A linear layer in fp8 that stays in fp8 when its model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo_kernels import linear_fp8, quantize_rows
from flowturbo_kernels.linear import Activation

KINDS = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}
"""The dtypes of a layer's buffers. A scale of lower precision would change the weight."""
_BITS = {torch.float8_e4m3fn: torch.uint8, torch.float32: torch.int32}


class Fp8Linear(nn.Module):
    """A linear layer with its weight in fp8 (e4m3) and one scale per output.

    The input is quantised row by row. The layer moves between devices like others, but casts such
    as to(dtype) change only its bias.
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
        """x (..., K) -> (..., N), in x's dtype.

        Raises TypeError if weight or scale were cast to another dtype in spite of `_apply`.
        """
        if self.weight.dtype != KINDS["weight"] or self.weight_scale.dtype != KINDS["weight_scale"]:
            # Checked here too, since skip_checks() leaves out the checks of the operation.
            raise TypeError(
                f"a layer in fp8 must have {_described(KINDS)}, got {_described(self._kinds())}: "
                "was it cast?"
            )
        return linear_fp8(x, self.weight, self.weight_scale, self.bias, activation)

    def _kinds(self) -> dict[str, torch.dtype]:
        return {name: getattr(self, name).dtype for name in KINDS}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """The function behind to(), half(), cuda() and the like.

        Those cast no integers, so weight and scale are passed to them as integers.
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
        """Refuse weights and scales of other dtypes.

        torch would cast them silently, and a weight is meaningless without its own scale.
        """
        errors: list[str] = rest[-1]
        for name, kind in KINDS.items():
            value = state.get(prefix + name)
            if value is not None and value.dtype != kind:
                errors.append(
                    f"{prefix}{name} must be {kind}, of a layer in fp8, got {value.dtype}"
                )
        super()._load_from_state_dict(state, prefix, *rest)


def _described(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
