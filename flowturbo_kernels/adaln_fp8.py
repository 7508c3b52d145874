"""The two adaLN operations of a DiT block with the modulated rows in fp8 (e4m3), for a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import adaln
from ._e4m3 import TINY, no_e4m3
from ._op import op
from ._triton import in_turn, kernel, pieces, rows, tl
from .adaln import EPS, _load, _modulate, _store
from .arguments import modulation_rows, wide
from .linear_fp8 import quantize_rows

# Triton: as in adaln.py; a program has its whole row, and so the row's largest magnitude.


@kernel
def _store_quantized(
    out, scale, row, main, tail, TINY: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr
):  # fmt: skip
    """The row in e4m3 and its scale, with which its largest magnitude becomes 448."""
    inside = MAIN + tl.arange(0, TAIL) < D
    largest = tl.max(tl.where(inside, tl.abs(tail), 0.0))
    s = tl.maximum(tl.maximum(tl.max(tl.abs(main)), largest) / 448.0, TINY)
    tl.store(scale + row, s)
    _store(out + row * D, main / s, tail / s, D, MAIN, TAIL)


@kernel
def _adaln_quantized_kernel(
    x, y, gate, shift, scale, total, out, out_scale, T, M, x_b, x_t, y_b, y_t, gate_b, shift_b,
    scale_b, eps, RESIDUAL: tl.constexpr, TINY: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    m = tl.minimum(b, M - 1)
    main, tail = _load(x + b * x_b + t * x_t, D, MAIN, TAIL)
    if RESIDUAL:
        y_main, y_tail = _load(y + b * y_b + t * y_t, D, MAIN, TAIL)
        gate_main, gate_tail = _load(gate + m * gate_b, D, MAIN, TAIL)
        main += gate_main * y_main
        tail += gate_tail * y_tail
        _store(total + row * D, main, tail, D, MAIN, TAIL)
    main, tail = _modulate(main, tail, shift + m * shift_b, scale + m * scale_b, eps, D, MAIN, TAIL)
    _store_quantized(out, out_scale, row, main, tail, TINY, D, MAIN, TAIL)


def _unsupported(x: Tensor, *rest: Any) -> str | None:
    return no_e4m3(x) or adaln._unsupported(x)


def _launch(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    total: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, gate and total come together or not at all -> (q, its scale)."""
    B, T, D = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    out_scale = torch.empty(B * T, dtype=torch.float32, device=x.device)
    tensors = [x if t is None else t for t in (x, y, gate, shift, scale, total)]
    strides = [0 if t is None else t.stride(i) for t, i in ((y, 0), (y, 1), (gate, 0))]
    _adaln_quantized_kernel.launch(
        (B * T,), *tensors, out, out_scale, T, len(shift), *x.stride()[:2], *strides,
        shift.stride(0), scale.stride(0), eps, y is not None, TINY, D, *pieces(D),
        num_warps=adaln._warps(D)
    )  # fmt: skip
    return out, out_scale


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) -> (q of its shape, scale of its rows), as `quantize_rows` does it."""
    q, scale = quantize_rows.reference(x.flatten(0, -2))
    return q.view(x.shape), scale


@op(
    check=adaln._check,
    example=adaln._example,
    schema="(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
)
def adaln_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """`adaln_modulate` with its result quantised row by row.

    x (B, T, D); shift, scale (B, D) or fewer, as there -> (q (B, T, D) float8_e4m3fn, its scale
    (B * T,) float32), adaln_modulate(x, shift, scale) ~ q * scale. Nothing is rounded to x's dtype
    on the way.
    """
    return quantized_rows(adaln._modulated(x.to(wide(x)), shift, scale, eps))


@adaln_quantized.backend("triton", unsupported=_unsupported)
def _adaln_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch(rows(x), None, None, rows(shift), rows(scale), None, eps)


@op(
    check=adaln._check_residual,
    example=adaln._example_residual,
    schema=(
        "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor, "
        "Tensor, Tensor)"
    ),
)
def gated_residual_adaln_quantized(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual_adaln` with its second result quantised row by row.

    x, y (B, T, D); gate, shift, scale as there -> (x + gate*y, (B, T, D) in x's dtype; q (B, T, D)
    float8_e4m3fn; its scale (B * T,) float32). q is computed from the sum before it is rounded.
    """
    dtype = wide(x)
    total = x.to(dtype) + modulation_rows(gate, len(x)).to(dtype)[:, None] * y.to(dtype)
    return total.to(x.dtype), *quantized_rows(adaln._modulated(total, shift, scale, eps))


@gated_residual_adaln_quantized.backend("triton", unsupported=_unsupported)
def _residual_adaln_triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, *_launch(rows(x), rows(y), rows(gate), rows(shift), rows(scale), total, eps)
