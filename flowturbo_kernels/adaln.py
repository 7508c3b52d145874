"""The two adaLN operations of a DiT block: adaLN alone, and residual + adaLN, between two
sub-blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda
from ._op import op
from ._triton import in_turn, kernel, pieces, rows, tl, too_many_rows
from .arguments import (
    Make,
    expect_floating,
    expect_modulation,
    expect_shape,
    modulation_rows,
    wide,
)

EPS = 1e-6

# bfloat16 on the CPU: the reference's arithmetic, an image at a time and in place, so that what is
# wide stays in the cache. Small images go together, since every call costs.

_LARGE = 16384
"""Numbers of an image from which it goes alone."""

# Triton: one program per row, which stays in registers in two pieces (see _triton.pieces): it is
# read once and written once.


@kernel
def _load(ptr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    at = MAIN + tl.arange(0, TAIL)
    main = tl.load(ptr + tl.arange(0, MAIN)).to(tl.float32)
    return main, tl.load(ptr + at, mask=at < D, other=0.0).to(tl.float32)


@kernel
def _store(ptr, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    at = MAIN + tl.arange(0, TAIL)
    tl.store(ptr + tl.arange(0, MAIN), main)
    tl.store(ptr + at, tail, mask=at < D)


@kernel
def _modulate(
    main, tail, shift, scale, eps, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):
    """LayerNorm of one row, times (1 + scale), plus shift."""
    mean = (tl.sum(main) + tl.sum(tail)) / D
    main -= mean
    tail = tl.where(MAIN + tl.arange(0, TAIL) < D, tail - mean, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(main * main) + tl.sum(tail * tail)) / D + eps)
    shift_main, shift_tail = _load(shift, D, MAIN, TAIL)
    scale_main, scale_tail = _load(scale, D, MAIN, TAIL)
    main = main * rstd * (1.0 + scale_main) + shift_main
    return main, tail * rstd * (1.0 + scale_tail) + shift_tail


@kernel
def _adaln_kernel(
    x, shift, scale, out, T, M, x_b, x_t, shift_b, scale_b, eps, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    in_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    main, tail = _load(x + b * x_b + t * x_t, D, MAIN, TAIL)
    m = tl.minimum(b, M - 1)  # the last row of M is that of all rows of x beyond it
    main, tail = _modulate(main, tail, shift + m * shift_b, scale + m * scale_b, eps, D, MAIN, TAIL)
    _store(out + row * D, main, tail, D, MAIN, TAIL)


@kernel
def _residual_adaln_kernel(
    x, y, gate, shift, scale, total, out, T, M, x_b, x_t, y_b, y_t, gate_b, shift_b, scale_b, eps,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    main, tail = _load(x + b * x_b + t * x_t, D, MAIN, TAIL)
    y_main, y_tail = _load(y + b * y_b + t * y_t, D, MAIN, TAIL)
    m = tl.minimum(b, M - 1)
    gate_main, gate_tail = _load(gate + m * gate_b, D, MAIN, TAIL)
    main += gate_main * y_main
    tail += gate_tail * y_tail
    _store(total + row * D, main, tail, D, MAIN, TAIL)
    main, tail = _modulate(main, tail, shift + m * shift_b, scale + m * scale_b, eps, D, MAIN, TAIL)
    _store(out + row * D, main, tail, D, MAIN, TAIL)


def _unsupported(x: Tensor, *_: Any) -> str | None:
    B, T, D = x.shape
    if not 2 <= D <= 16384:
        return f"the hidden size must be from 2 to 16384, got {D}"
    return too_many_rows(B * T)


def _warps(D: int) -> int:
    """At least 8 elements per lane: one 16-byte load of 16-bit numbers."""
    return max(1, min(16, pieces(D)[0] // 256))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normalised = F.layer_norm(x, x.shape[-1:], eps=eps)
    scale, shift = (modulation_rows(m, len(x)).to(x.dtype)[:, None] for m in (scale, shift))
    if torch.is_grad_enabled():
        return normalised * (1 + scale) + shift
    return normalised.mul_(1 + scale).add_(shift)


def _check(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> None:
    expect_shape("adaln_modulate", "x", x, (None, None, None))
    expect_floating("adaln_modulate", x=x, shift=shift, scale=scale)
    B, _, D = x.shape
    expect_modulation("adaln_modulate", "shift", shift, B, D)
    expect_shape("adaln_modulate", "scale", scale, tuple(shift.shape))


_SHAPES = (1, 1, 1, 8), (2, 2, 7, 72), (3, 3, 16, 96), (6, 4, 5, 96), (2, 2, 64, 1152)


def _example(make: Make) -> Iterable[tuple[Tensor, ...]]:
    for B, M, T, D in _SHAPES:
        yield make(B, T, D), make(M, D), make(M, D)


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
)
def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm without affine, times (1 + scale), plus shift.

    x (B, T, D); shift, scale (B, D), rows may be strided -> (B, T, D) in x's dtype. Statistics in
    float32 or wider. With B = 2N, shift and scale may be (N + 1, D): their last row is that of the
    last N rows of x, the half of guidance with the null class.
    """
    return _modulated(x.to(wide(x)), shift, scale, eps).to(x.dtype)


@adaln_modulate.cpu_bfloat16
def _adaln_cpu(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    if x[:1].numel() < _LARGE:
        return adaln_modulate.reference(x, shift, scale, eps)
    shift, scale = (modulation_rows(m, len(x)) for m in (shift, scale))
    out, wide_x = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x[:1].shape, dtype=torch.float32, device=x.device),
    )
    for image, offset, gain, to in zip(*(t.split(1) for t in (x, shift, scale, out)), strict=True):
        to.copy_(_modulated(wide_x.copy_(image), offset, gain, eps))
    return out


@adaln_modulate.backend("triton", unsupported=_unsupported)
def _adaln_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    B, T, D = x.shape
    x, shift, scale = rows(x), rows(shift), rows(scale)
    out = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    strides = (*x.stride()[:2], shift.stride(0), scale.stride(0))
    _adaln_kernel.launch(
        (B * T,), x, shift, scale, out, T, len(shift), *strides, eps, D, *pieces(D),
        num_warps=_warps(D)
    )  # fmt: skip
    return out


def _check_residual(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> None:
    expect_shape("gated_residual_adaln", "x", x, (None, None, None))
    expect_floating("gated_residual_adaln", x=x, y=y, gate=gate, shift=shift, scale=scale)
    B, T, D = x.shape
    expect_shape("gated_residual_adaln", "y", y, (B, T, D))
    expect_modulation("gated_residual_adaln", "gate", gate, B, D)
    for argument, tensor in (("shift", shift), ("scale", scale)):
        expect_shape("gated_residual_adaln", argument, tensor, tuple(gate.shape))


def _example_residual(make: Make) -> Iterable[tuple[Tensor, ...]]:
    for B, M, T, D in _SHAPES:
        yield make(B, T, D), make(B, T, D), make(M, D), make(M, D), make(M, D)


@op(
    check=_check_residual,
    example=_example_residual,
    schema=(
        "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor, "
        "Tensor)"
    ),
)
def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Residual + adaLN, between two sub-blocks: add the gated branch to the residual stream, and
    modulate the input of the next branch.

    x, y (B, T, D); gate, shift, scale (B, D), or (N + 1, D) as in `adaln_modulate` -> (x + gate*y,
    adaln_modulate of that), both (B, T, D) in x's dtype. The second output is computed from the sum
    before it is rounded to x's dtype.
    """
    dtype = wide(x)
    total = x.to(dtype) + modulation_rows(gate, len(x)).to(dtype)[:, None] * y.to(dtype)
    return total.to(x.dtype), _modulated(total, shift, scale, eps).to(x.dtype)


@gated_residual_adaln.cpu_bfloat16
def _residual_adaln_cpu(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if x[:1].numel() < _LARGE:
        return gated_residual_adaln.reference(x, y, gate, shift, scale, eps)
    gate, shift, scale = (modulation_rows(m, len(x)) for m in (gate, shift, scale))
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    wide_total, wide_y = (
        torch.empty(x[:1].shape, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    images = zip(*(t.split(1) for t in (x, y, gate, shift, scale, total, out)), strict=True)
    for image, branch, g, offset, gain, to_total, to in images:
        wide_total.copy_(image).add_(wide_y.copy_(branch).mul_(g.float()[:, None]))
        to_total.copy_(wide_total)
        to.copy_(_modulated(wide_total, offset, gain, eps))
    return total, out


@gated_residual_adaln.backend("triton", unsupported=_unsupported)
def _residual_adaln_triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    B, T, D = x.shape
    x, y, gate, shift, scale = map(rows, (x, y, gate, shift, scale))
    total, out = (torch.empty(B, T, D, dtype=x.dtype, device=x.device) for _ in range(2))
    strides = (*x.stride()[:2], *y.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0))
    _residual_adaln_kernel.launch(
        (B * T,), x, y, gate, shift, scale, total, out, T, len(shift), *strides, eps, D, *pieces(D),
        num_warps=_warps(D)
    )  # fmt: skip
    return total, out


# CUDA: csrc/adaln.cu, one warp a row.


class _AdaLN(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        [(name, ctypes.c_void_p) for name in ("x", "y", "gate", "shift", "scale", "total", "out")]
        + [(name, ctypes.c_longlong) for name in ("x_b", "x_t", "y_b", "y_t")]
        + [(name, ctypes.c_longlong) for name in ("gate_b", "shift_b", "scale_b")]
        + [(name, ctypes.c_uint) for name in ("B", "T", "D", "per_warp", "M")]
        + [("eps", ctypes.c_float)]
    )


_WARPS = 4
"""Of a block."""
_BUSY = 1024
"""Warps that keep a GPU's memory busy: with fewer, none takes more than one row."""


def _items(dtype: torch.dtype) -> tuple[int, ...]:
    """Vectors of a lane, as csrc has instances."""
    return (3, 6, 9) if dtype == torch.float32 else (2, 3, 5)


def cuda_call(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    total: Tensor | None, out: Tensor, eps: float,
) -> tuple[str, tuple[int], int, ctypes.Structure]:  # fmt: skip
    """(instance, grid, threads, arguments) of csrc's kernel. All rows are whole vectors, dense and
    aligned (see _cuda.in_vectors); y, gate and total come together or not at all.
    """
    B, T, D = x.shape
    V = 16 // x.element_size()
    items = next(i for i in _items(x.dtype) if 32 * V * i >= D)
    per_warp = 1
    while per_warp < 8 and 2 * per_warp * _BUSY <= B * T:
        per_warp *= 2
    strides = (
        *x.stride()[:2],
        *((0, 0) if y is None else y.stride()[:2]),
        0 if gate is None else gate.stride(0),
    )
    pointers = map(_cuda.pointer, (x, y, gate, shift, scale, total, out))
    strides = (*strides, shift.stride(0), scale.stride(0))
    args = _AdaLN(*pointers, *strides, B, T, D, per_warp, len(shift), eps)
    grid = -(-B * -(-T // per_warp) // _WARPS)
    name = f"flowturbo::adaln<{_cuda.NAMES[x.dtype]},{V},{items},{str(y is not None).lower()}>"
    return name, (grid,), 32 * _WARPS, args


def _unsupported_cuda(x: Tensor, *rest: Any) -> str | None:
    D, most = x.shape[2], 512 // x.element_size() * _items(x.dtype)[-1]
    if most < D:
        return f"the hidden size must be at most {most} in {x.dtype}, got {D}"
    return (
        _cuda.no_vectors(x.dtype, "the hidden size", D)
        or _unsupported(x)
        or _cuda.same_dtype(x, *rest)
    )


@adaln_modulate.backend("cuda", unsupported=_unsupported_cuda)
def _adaln_cuda(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x, shift, scale = map(_cuda.in_vectors, (x, shift, scale))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    name, grid, threads, args = cuda_call(x, None, None, shift, scale, None, out, eps)
    _cuda.launch(name, grid, threads, 0, args)
    return out


@gated_residual_adaln.backend("cuda", unsupported=_unsupported_cuda)
def _residual_adaln_cuda(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, y, gate, shift, scale = map(_cuda.in_vectors, (x, y, gate, shift, scale))
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    name, grid, threads, args = cuda_call(x, y, gate, shift, scale, total, out, eps)
    _cuda.launch(name, grid, threads, 0, args)
    return total, out
