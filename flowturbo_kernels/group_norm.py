"""GroupNorm and SiLU in one operation, on channels-last images: the VAE decoder's normalisation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda
from ._op import op
from ._triton import in_turn, kernel, next_power_of_2, tl, too_many_images
from .arguments import Make, expect_floating, expect_shape, wide

EPS = 1e-6
_PIXELS = 256
"""Pixels of one program. One program per group would leave most of a GPU idle: 32 groups, 132
multiprocessors.
"""

_MAX_HELD = 4096
"""Numbers that a Triton program holds at once, 32 per thread: with 16384 the registers spill."""

# Triton, two passes. Statistics: a program reads all channels of a block of pixels and writes each
# group's mean and sum of squared deviations. Application: a program merges its image's partial
# statistics (Chan et al. 1983), without cancellation whatever the mean of the data, and writes a
# block of pixels. Channels are contiguous, so both passes read whole lines.


@kernel
def _statistics_kernel(
    x, means, squares, HW, blocks, C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    group = tl.arange(0, BLOCK_G)
    inner = tl.arange(0, BLOCK_C)
    channel = group[:, None] * (C // G) + inner[None, :]
    valid = (group < G)[:, None] & (inner < C // G)[None, :]
    first = block * PIXELS
    count = tl.minimum(HW - first, PIXELS) * (C // G)
    total = tl.zeros((BLOCK_P, BLOCK_G, BLOCK_C), dtype=tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        pixel = first + start + tl.arange(0, BLOCK_P)
        at = (n * HW + pixel[:, None, None]) * C + channel[None, :, :]
        total += tl.load(
            x + at, mask=(pixel < HW)[:, None, None] & valid[None, :, :], other=0.0
        ).to(tl.float32)
    mean = tl.sum(tl.sum(total, axis=2), axis=0) / count
    total = tl.zeros((BLOCK_P, BLOCK_G, BLOCK_C), dtype=tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        pixel = first + start + tl.arange(0, BLOCK_P)
        at = (n * HW + pixel[:, None, None]) * C + channel[None, :, :]
        inside = (pixel < HW)[:, None, None] & valid[None, :, :]
        difference = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :, None]
        total += tl.where(inside, difference * difference, 0.0)
    place = (n * blocks + block) * G + group
    tl.store(means + place, mean, mask=group < G)
    tl.store(squares + place, tl.sum(tl.sum(total, axis=2), axis=0), mask=group < G)


@kernel
def _apply_kernel(
    x, weight, bias, means, squares, out, HW, blocks, eps, C: tl.constexpr, G: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    group = tl.arange(0, BLOCK_G)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        valid = (b < blocks)[:, None] & (group < G)[None, :]
        share = tl.minimum(HW - b * PIXELS, PIXELS) * 1.0 / HW
        part = tl.load(
            means + (n * blocks + b[:, None]) * G + group[None, :], mask=valid, other=0.0
        )
        total += tl.sum(part * share[:, None], axis=0)
    mean = total
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        valid = (b < blocks)[:, None] & (group < G)[None, :]
        count = tl.minimum(HW - b * PIXELS, PIXELS) * (C // G) * 1.0
        place = (n * blocks + b[:, None]) * G + group[None, :]
        difference = tl.load(means + place, mask=valid, other=0.0) - mean[None, :]
        square = (
            tl.load(squares + place, mask=valid, other=0.0)
            + count[:, None] * difference * difference
        )
        total += tl.sum(tl.where(valid, square, 0.0), axis=0)
    rstd = 1.0 / tl.sqrt(total / (HW * (C // G) * 1.0) + eps)
    inner = tl.arange(0, BLOCK_C)
    channel = group[:, None] * (C // G) + inner[None, :]
    valid = (group < G)[:, None] & (inner < C // G)[None, :]
    gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32) * rstd[:, None]
    offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32) - mean[:, None] * gain
    for start in range(0, PIXELS, BLOCK_P):
        pixel = block * PIXELS + start + tl.arange(0, BLOCK_P)
        at = (n * HW + pixel[:, None, None]) * C + channel[None, :, :]
        inside = (pixel < HW)[:, None, None] & valid[None, :, :]
        y = (
            tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * gain[None, :, :]
            + offset[None, :, :]
        )
        y = tl.where(inside, y, 0.0)  # or the exponential of masked lanes may overflow
        tl.store(out + at, y / (1.0 + tl.exp(-y)), mask=inside)


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


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> str | None:
    C = x.shape[1]
    if next_power_of_2(groups) * next_power_of_2(C // groups) > _MAX_HELD:
        return (
            f"at most {_MAX_HELD} channels, with groups and their sizes filled up to powers of "
            f"two, got {C} in {groups} groups"
        )
    return too_many_images(len(x))


@group_norm_silu.backend("triton", unsupported=_unsupported)
def _group_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    N, C, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    blocks = -(-H * W // _PIXELS)
    means, squares = (
        torch.empty(N, blocks, groups, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    out = torch.empty_like(x)
    block_g, block_c = next_power_of_2(groups), next_power_of_2(C // groups)
    block_p = max(1, min(_PIXELS, _MAX_HELD // (block_g * block_c)))
    block_b = min(64, next_power_of_2(blocks), _MAX_HELD // block_g)
    sizes = (C, groups, _PIXELS, block_p, block_g, block_c)
    _statistics_kernel.launch((blocks, N), x, means, squares, H * W, blocks, *sizes, num_warps=4)
    tensors = x, weight.contiguous(), bias.contiguous(), means, squares, out
    _apply_kernel.launch((blocks, N), *tensors, H * W, blocks, eps, *sizes, block_b, num_warps=4)
    return out


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
