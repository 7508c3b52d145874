"""The two adaLN operations of a DiT block: modulate a normalised row, and the seam between two sub-blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ._op import Make, expect_floating, expect_shape, op, wide

EPS = 1e-6


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normalised = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normalised * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]


def _check(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> None:
    expect_shape("adaln_modulate", "x", x, (None, None, None))
    expect_floating("adaln_modulate", x=x, shift=shift, scale=scale)
    B, _, D = x.shape
    expect_shape("adaln_modulate", "shift", shift, (B, D))
    expect_shape("adaln_modulate", "scale", scale, (B, D))


def _example(make: Make) -> Iterable[tuple[Tensor, ...]]:
    for B, T, D in ((1, 1, 8), (2, 7, 72), (3, 16, 96), (2, 64, 1152)):
        yield make(B, T, D), make(B, D), make(B, D)


@op(check=_check, example=_example)
def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm without affine, times (1 + scale), plus shift.

    x (B, T, D); shift, scale (B, D), rows may be strided -> (B, T, D) in x's dtype. Statistics in float32 or wider.
    """
    return _modulated(x.to(wide(x)), shift, scale, eps).to(x.dtype)


def _check_seam(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> None:
    expect_shape("gated_residual_adaln", "x", x, (None, None, None))
    expect_floating("gated_residual_adaln", x=x, y=y, gate=gate, shift=shift, scale=scale)
    B, T, D = x.shape
    expect_shape("gated_residual_adaln", "y", y, (B, T, D))
    for argument, tensor in (("gate", gate), ("shift", shift), ("scale", scale)):
        expect_shape("gated_residual_adaln", argument, tensor, (B, D))


def _example_seam(make: Make) -> Iterable[tuple[Tensor, ...]]:
    for B, T, D in ((1, 1, 8), (2, 7, 72), (3, 16, 96), (2, 64, 1152)):
        yield make(B, T, D), make(B, T, D), make(B, D), make(B, D), make(B, D)


@op(check=_check_seam, example=_example_seam)
def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The seam between two sub-blocks: add the gated branch to the residual stream and modulate what comes next.

    x, y (B, T, D); gate, shift, scale (B, D) -> (x + gate*y, adaln_modulate of that), both (B, T, D) in x's dtype.
    The second output is computed from the sum before it is rounded to x's dtype.
    """
    total = x.to(wide(x)) + gate.to(wide(x))[:, None] * y.to(wide(x))
    return total.to(x.dtype), _modulated(total, shift, scale, eps).to(x.dtype)
