"""GroupNorm and SiLU in one operation, on channels-last images: the VAE decoder's normalisation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda
from ._group_norm import MAX_HELD, normalise, statistics
from ._op import op
from ._triton import next_power_of_2, too_many_images
from .arguments import Make, expect_floating, expect_shape, wide

EPS = 1e-6
_PIXELS = 256
"""Pixels of one block of csrc's. One block per group would leave most of a GPU idle: 32 groups, 132
multiprocessors.
"""


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = EPS) -> None:
    expect_shape("group_norm_silu", "x", x, (None, None, None, None))
    expect_floating("group_norm_silu", x=x, weight=weight, bias=bias)
    C = x.shape[1]
    if groups < 1 or C % groups:
        raise ValueError(f"group_norm_silu: groups must divide the {C} channels of x, got {groups}")
    expect_shape("group_norm_silu", "weight", weight, (C,))
    expect_shape("group_norm_silu", "bias", bias, (C,))


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for N, C, H, W, groups in (
        (1, 4, 1, 1, 2),
        (2, 32, 8, 8, 32),
        (2, 96, 5, 7, 32),
        (1, 512, 20, 20, 32),
    ):
        x = make(N, C, H, W).to(memory_format=torch.channels_last)
        yield x, make(C), make(C), groups


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> Tensor",
    memory_format=torch.channels_last,
)
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = EPS
) -> Tensor:
    """silu(GroupNorm(x)): statistics over each group's channels and all pixels of an image, in
    float32 or wider.

    x (N, C, H, W), best in channels-last memory; weight, bias (C,) -> (N, C, H, W) in x's dtype,
    channels-last.
    """
    dtype = wide(x)
    y = F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    return F.silu(y).to(x.dtype).contiguous(memory_format=torch.channels_last)


def unsupported(x: Tensor, groups: int) -> str | None:
    """Why the kernels can't normalise images of x's shape in so many groups, or None."""
    C = x.shape[1]
    if next_power_of_2(groups) * next_power_of_2(C // groups) > MAX_HELD:
        return (
            f"at most {MAX_HELD} channels, with groups and their sizes filled up to powers of "
            f"two, got {C} in {groups} groups"
        )
    return too_many_images(len(x))


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> str | None:
    return unsupported(x, groups)


@group_norm_silu.backend("triton", unsupported=_unsupported)
def _group_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return normalised(x, weight, bias, groups, eps, None, True)


def normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    shift = None if shift is None else shift.contiguous()
    found = statistics(x, shift, groups)
    return normalise(x, shift, found, weight.contiguous(), bias.contiguous(), eps, silu)


# CUDA: csrc/group_norm_silu.cu


class _GroupNorm(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "parts", "affine", "out")]
        + [(name, ctypes.c_longlong) for name in ("N", "HW", "C", "G", "tiles")]
        + [("lanes", ctypes.c_int), ("eps", ctypes.c_float)]
    )


_THREADS = 256
"""Of a block, at most."""
_ITEMS = 8
"""Pixels of a lane."""
_FULL = 128
"""Blocks that leave few of a GPU's multiprocessors idle."""


def cuda_lanes(x: Tensor) -> int:
    """Lanes of a tile of csrc's kernels on x (N, C, H, W): as many as a block has threads for, or
    fewer, but two warps at least, where there would be too few blocks.
    """
    N, C, H, W = x.shape
    vectors = C * x.element_size() // 16
    lanes = max(1, _THREADS // vectors)
    while lanes > 1 and lanes * vectors > 64 and N * -(-H * W // (lanes * _ITEMS)) < _FULL:
        lanes = -(-lanes // 2)
    return lanes


def cuda_calls(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, parts: Tensor, affine: Tensor,
    out: Tensor,
) -> list[tuple[str, tuple[int, int], int, ctypes.Structure]]:  # fmt: skip
    """(instance, grid, threads, arguments) of csrc's three kernels.

    x, out (N, C, H, W), channels-last; parts (N, groups, tiles, 2) and affine (N, 2, C), float32.
    """
    N, C, H, W = x.shape
    V, lanes, tiles = 16 // x.element_size(), cuda_lanes(x), parts.shape[2]
    slot = next(s for s in (V, 4, 1) if C // groups % s == 0)
    pointers = map(_cuda.pointer, (x, weight, bias, parts, affine, out))
    args = _GroupNorm(*pointers, N, H * W, C, groups, tiles, lanes, eps)
    kind, threads = _cuda.NAMES[x.dtype], lanes * C // V
    merging = min(_THREADS, -(-tiles // 32) * 32)
    return [
        (f"flowturbo::group_norm_statistics<{kind},{V},{slot}>", (tiles, N), threads, args),
        (f"flowturbo::group_norm_merge<{kind}>", (groups, N), merging, args),
        (f"flowturbo::group_norm_apply<{kind},{V}>", (tiles, N), threads, args),
    ]


def cuda_buffers(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`parts` and `affine` of `cuda_calls`."""
    N, C, H, W = x.shape
    tiles = -(-H * W // (cuda_lanes(x) * _ITEMS))
    sizes = (N, groups, tiles, 2), (N, 2, C)
    parts, affine = (torch.empty(s, dtype=torch.float32, device=x.device) for s in sizes)
    return parts, affine


def _unsupported_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> str | None:
    C, most = x.shape[1], _THREADS * 16 // x.element_size()
    if most < C:
        return f"at most {most} channels in {x.dtype}, got {C}"
    return (
        _cuda.no_vectors(x.dtype, "channels", C)
        or too_many_images(len(x))
        or _cuda.same_dtype(x, weight, bias)
    )


@group_norm_silu.backend("cuda", unsupported=_unsupported_cuda)
def _group_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    x = x.clone() if _cuda.misaligned(x) else x
    out = torch.empty_like(x)
    weight, bias, (parts, affine) = weight.contiguous(), bias.contiguous(), cuda_buffers(x, groups)
    calls = cuda_calls(x, weight, bias, groups, eps, parts, affine, out)
    for name, grid, threads, args in calls:  # which hold pointers, not tensors
        _cuda.launch(name, grid, threads, 0, args)
    return out
