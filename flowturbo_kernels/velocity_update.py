"""The update of x in a solver step: x plus weighted velocities."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _cuda
from ._op import op
from ._triton import in_turn, kernel, tl, too_many_images
from .arguments import Make, expect_floating, wide

MAX_VELOCITIES = 4
"""Velocities that a kernel takes: those of Adams-Bashforth of order 4."""
BLOCK = 1024
"""Elements of one Triton program, at most."""

# Triton: one program per block of elements.


@kernel
def add_velocities(x, v0, v1, v2, v3, w0, w1, w2, w3, at, mask, COUNT: tl.constexpr):
    """x plus COUNT weighted velocities."""
    total = tl.load(x + at, mask=mask).to(tl.float32)
    if COUNT > 0:
        total += w0 * tl.load(v0 + at, mask=mask).to(tl.float32)
    if COUNT > 1:
        total += w1 * tl.load(v1 + at, mask=mask).to(tl.float32)
    if COUNT > 2:
        total += w2 * tl.load(v2 + at, mask=mask).to(tl.float32)
    if COUNT > 3:
        total += w3 * tl.load(v3 + at, mask=mask).to(tl.float32)
    return total


@kernel
def _update_kernel(
    x, v0, v1, v2, v3, out, w0, w1, w2, w3, size, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(
        out + at, add_velocities(x, v0, v1, v2, v3, w0, w1, w2, w3, at, mask, COUNT), mask=mask
    )


def too_many_velocities(
    x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]
) -> str | None:
    """Why a kernel can't take these velocities, or None."""
    if len(velocities) <= MAX_VELOCITIES:
        return None
    return f"at most {MAX_VELOCITIES} velocities, got {len(velocities)}"


def pad_velocities(
    velocities: Sequence[Tensor], weights: Sequence[float], filler: Tensor
) -> tuple[Any, ...]:
    """Kernel arguments: MAX_VELOCITIES dense tensors, and as many weights; the kernel does not read
    the filler.
    """
    missing = MAX_VELOCITIES - len(velocities)
    tensors = (*(v.contiguous() for v in velocities), *(filler,) * missing)
    return tensors, (*map(float, weights), *(0.0,) * missing)


def _check(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> None:
    if not velocities or len(velocities) != len(weights):
        raise ValueError(
            "velocity_update: weights must be as many as velocities, and at least one, got "
            f"{len(weights)} and {len(velocities)}"
        )
    check_velocities("velocity_update", x, velocities)


def check_velocities(op_name: str, x: Tensor, velocities: Sequence[Tensor]) -> None:
    """ValueError or TypeError, in the name of the op, unless x can move by these velocities."""
    for k, v in enumerate(velocities):
        expect_floating(op_name, x=x, **{f"velocities[{k}]": v})
        if v.shape[1:] != x.shape[1:] or len(v) < len(x):
            raise ValueError(
                f"{op_name}: velocities[{k}] must have at least the rows of x {tuple(x.shape)}, "
                f"got {tuple(v.shape)}"
            )


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    yield make(1, 1, 8, 8), [make(1, 1, 8, 8)], [0.1]
    yield make(2, 4, 8, 8), [make(4, 4, 8, 8), make(4, 4, 8, 8)], [0.05, 0.05]
    yield make(3, 4, 5, 7), [make(3, 4, 5, 7) for _ in range(4)], [0.2, -0.1, 0.03, -0.01]


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor[] velocities, float[] weights) -> Tensor",
)
def velocity_update(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """x plus the weighted velocities: the update of every explicit solver step.

    x (N, ...); velocities: each (N or more, ...), of which the first N rows are read; weights:
    floats, with the step size in them -> (N, ...) in x's dtype.
    """
    N, dtype = len(x), wide(x, *velocities)
    total = x.to(dtype)
    for v, weight in zip(velocities, weights, strict=True):
        total = total + weight * v[:N].to(dtype)
    return total.to(x.dtype)


@velocity_update.backend("triton", unsupported=too_many_velocities)
def _update_triton(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    x = x.contiguous()
    tensors, numbers = pad_velocities([v[: len(x)] for v in velocities], weights, x)
    out = torch.empty_like(x)
    size = x.numel()
    _update_kernel.launch(
        (-(-size // BLOCK),), x, *tensors, out, *numbers, size, len(velocities), BLOCK
    )
    return out


# CUDA: csrc/velocity_update.cu, which guided_update launches as well.

_THREADS = 64
"""Of a block, at most."""


class _VelocityUpdate(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        [(name, ctypes.c_void_p) for name in ("x", "raw", "scale", "base")]
        + [("velocities", ctypes.c_void_p * MAX_VELOCITIES)]
        + [(name, ctypes.c_void_p) for name in ("out", "velocity")]
        + [(name, ctypes.c_longlong) for name in ("N", "S", "HW")]
        + [("weight", ctypes.c_float), ("weights", ctypes.c_float * MAX_VELOCITIES)]
        + [(name, ctypes.c_int) for name in ("count", "channels")]
    )


def cuda_call(
    x: Tensor, raw: Tensor | None, scale: Tensor | None, base: Tensor | None,
    velocities: Sequence[Tensor], weights: Sequence[float], out: Tensor, velocity: Tensor | None,
    weight: float = 0.0, channels: int = 0,
) -> tuple[str, tuple[int, int], int, ctypes.Structure]:  # fmt: skip
    """(instance, grid, threads, arguments) of csrc's kernel; all tensors dense, scale (N,) float32;
    out may be x.
    """
    N, S, HW = len(x), x[0].numel(), x[0, 0].numel() if x.ndim > 2 else x[0].numel()
    misaligned = _cuda.misaligned(x, raw, base, *velocities, out, velocity)
    V = 1 if misaligned else _cuda.vector(x.dtype, S)
    threads = min(_THREADS, -(-S // V // 32) * 32)
    args = _VelocityUpdate(
        *map(_cuda.pointer, (x, raw, scale, base)),
        (ctypes.c_void_p * MAX_VELOCITIES)(*map(_cuda.pointer, velocities)),
        *map(_cuda.pointer, (out, velocity)),
        N, S, HW, weight, (ctypes.c_float * MAX_VELOCITIES)(*weights), len(velocities), channels,
    )  # fmt: skip
    T, R = _cuda.NAMES[x.dtype], _cuda.NAMES[x.dtype if raw is None else raw.dtype]
    grid = -(-S // (V * threads)), N
    return f"flowturbo::velocity_update<{T},{R},{V}>", grid, threads, args


def _unsupported_cuda(
    x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]
) -> str | None:
    return (
        too_many_velocities(x, velocities, weights)
        or too_many_images(len(x))
        or _cuda.same_dtype(x, *velocities)
    )


@velocity_update.backend("cuda", unsupported=_unsupported_cuda)
def _update_cuda(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dense = [v[: len(x)].contiguous() for v in velocities]  # kept until the launch
    name, grid, threads, args = cuda_call(x, None, None, None, dense, weights, out, None)
    _cuda.launch(name, grid, threads, 0, args)
    return out
