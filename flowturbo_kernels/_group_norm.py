"""The kernels around a GroupNorm of channels-last images: sums before it, statistics, application.

A program takes a tile: all channels of some pixels, 32 KB of them, in eight loads of 16 bytes a
thread that wait for nothing but each other. The tile stays in registers while each group's mean and
then its sum of squared deviations are taken. These partial statistics are merged as in Chan et al.
1983, without cancellation whatever the mean of the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import in_turn, kernel, next_power_of_2, tl

_WARPS = 8
_LOADS = 8
"""Loads of 16 bytes that a thread has in flight."""
MAX_HELD = 4096
"""Numbers of a tile whose groups or their sizes are no power of two, and are filled up to one."""
_FEW = 32
"""So many parts of an image are merged by every program that applies them: 8 KB for 32 groups,
beside a tile of 32 KB. More are merged once, by a kernel of their own.
"""
_MERGED = 4096
"""Partial statistics that the merging kernel holds at once."""

PLAIN, INTERLEAVED, DOUBLED = 0, 1, 2
"""Where the pixel of a row and column is read: there; in one of four images, by whether row and
column are odd; at half of both.
"""


@kernel
def _source(HW, W, first, C: tl.constexpr, P: tl.constexpr, SOURCE: tl.constexpr):
    """(numbers of an image, where in it pixels first, first + 1, ... are read)."""
    pixel = first + tl.arange(0, P)
    row, column = pixel // W, pixel % W
    if SOURCE == 1:
        i, j, width = row % 2, column % 2, W // 2 + 1
        at = ((row // 2 + i) * width + column // 2 + j) * (4 * C) + (2 * i + j) * C
        numbers = (HW // W // 2 + 1) * width * (4 * C)
    elif SOURCE == 2:
        at = ((row // 2) * (W // 2) + column // 2) * C
        numbers = HW // 4 * C
    else:
        at = pixel * C
        numbers = HW * C
    return numbers, at


@kernel
def _read(
    base, at, inside, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All channels of P pixels, which begin at `at`: (P, BLOCK_G, BLOCK_C), zero outside."""
    if BLOCK_G * BLOCK_C == C:
        channel = tl.arange(0, C)
        tile = tl.load(base + at[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
        return tl.reshape(tile, (P, BLOCK_G, BLOCK_C))
    else:
        channel, valid = _channels(C, G, BLOCK_G, BLOCK_C)
        return tl.load(
            base + at[:, None, None] + channel[None, :, :],
            mask=inside[:, None, None] & valid[None, :, :], other=0.0,
        )  # fmt: skip


@kernel
def _write(
    base, at, inside, tile, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if BLOCK_G * BLOCK_C == C:
        channel = tl.arange(0, C)
        tl.store(
            base + at[:, None] + channel[None, :], tl.reshape(tile, (P, C)), mask=inside[:, None]
        )
    else:
        channel, valid = _channels(C, G, BLOCK_G, BLOCK_C)
        tl.store(
            base + at[:, None, None] + channel[None, :, :], tile,
            mask=inside[:, None, None] & valid[None, :, :],
        )  # fmt: skip


@kernel
def _all_loads_first():
    """The assembler moves no load across a barrier: it would delay some, to save registers."""
    tl.debug_barrier()


@kernel
def _channels(C: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    group, inner = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    valid = (group < G)[:, None] & (inner < C // G)[None, :]
    return group[:, None] * (C // G) + inner[None, :], valid


@kernel
def _vector(ptr, C: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """A number a channel."""
    channel, valid = _channels(C, G, BLOCK_G, BLOCK_C)
    return tl.load(ptr + channel, mask=valid, other=0.0).to(tl.float32)


@kernel
def _keep_statistics(
    tile, inside, count, partial, at, far, C: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a tile's `count` pixels, whose others are anything: each group's mean, and, `far` from it,
    its sum of squared deviations.
    """
    valid = _channels(C, G, BLOCK_G, BLOCK_C)[1]
    valid = inside[:, None, None] & valid[None, :, :]
    tile = tl.where(valid, tile, 0.0)
    mean = tl.sum(tl.sum(tile, axis=2), axis=0) / (count * (C // G))
    difference = tl.where(valid, tile - mean[None, :, None], 0.0)
    squares = tl.sum(tl.sum(difference * difference, axis=2), axis=0)
    group = tl.arange(0, BLOCK_G)
    tl.store(partial + at + group, mean, mask=group < G)
    tl.store(partial + far + at + group, squares, mask=group < G)


@kernel
def _statistics_kernel(
    x, shift, partial, HW, parts, far, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n, part = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    count = tl.minimum(HW - part * P, P).to(tl.int32)
    pixel = tl.arange(0, P)
    base = x + (n * HW + part * P) * C
    tile = _read(base, pixel * C, pixel < count, C, G, P, BLOCK_G, BLOCK_C)
    _all_loads_first()
    tile = tile.to(tl.float32)
    if HAS_SHIFT:
        tile += _vector(shift, C, G, BLOCK_G, BLOCK_C)[None, :, :]
    at = (n * parts + part) * G
    _keep_statistics(tile, pixel < count, count, partial, at, far, C, G, BLOCK_G, BLOCK_C)


@kernel
def _add_kernel(
    y, shift, residual, residual_shift, out, partial, HW, W, parts, far, C: tl.constexpr,
    G: tl.constexpr, P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    SOURCE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_SHIFT: tl.constexpr, STATISTICS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    count = tl.minimum(HW - part * P, P)
    inside = tl.arange(0, P) < count
    numbers, at = _source(HW, W, part * P, C, P, SOURCE)
    total = _read(y + n * numbers, at, inside, C, G, P, BLOCK_G, BLOCK_C)
    if HAS_RESIDUAL:
        other = _read(residual + n * numbers, at, inside, C, G, P, BLOCK_G, BLOCK_C)
    _all_loads_first()
    if HAS_RESIDUAL:
        total = total.to(tl.float32) + other.to(tl.float32)
    if HAS_SHIFT:
        total = total.to(tl.float32) + _vector(shift, C, G, BLOCK_G, BLOCK_C)[None, :, :]
    if HAS_RESIDUAL_SHIFT:
        total += _vector(residual_shift, C, G, BLOCK_G, BLOCK_C)[None, :, :]
    total = total.to(out.dtype.element_ty)
    numbers, at = _source(HW, W, part * P, C, P, 0)
    _write(out + n * numbers, at, inside, total, C, G, P, BLOCK_G, BLOCK_C)
    if STATISTICS:
        at = (n * parts + part) * G
        total = total.to(tl.float32)
        _keep_statistics(total, inside, count, partial, at, far, C, G, BLOCK_G, BLOCK_C)


@kernel
def _merged(
    partial, n, group, HW, parts, far, eps, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of these groups of image n."""
    mean = tl.zeros((BLOCK_G,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_G,), dtype=tl.float32)
    before = 0.0  # pixels
    for first in range(0, parts, BLOCK_B):
        part = first + tl.arange(0, BLOCK_B).to(tl.int64)
        valid = (part < parts)[:, None] & (group < G)[None, :]
        at = partial + (n * parts + part[:, None]) * G + group[None, :]
        means = tl.load(at, mask=valid, other=0.0)
        deviations = tl.load(at + far, mask=valid, other=0.0)
        pixels = tl.where(part < parts, tl.minimum(HW - part * P, P), 0).to(tl.float32)
        here = tl.sum(pixels)
        mean_here = tl.sum(means * pixels[:, None], axis=0) / here
        apart = tl.where(valid, means - mean_here[None, :], 0.0)
        deviations += apart * apart * (pixels * (C // G))[:, None]
        apart_here = mean_here - mean
        share = here / (before + here)
        squares += tl.sum(deviations, axis=0) + apart_here * apart_here * (
            before * share * (C // G)
        )
        mean += apart_here * share
        before += here
    return mean, 1.0 / tl.sqrt(squares / (before * (C // G)) + eps)


@kernel
def _merge_kernel(
    partial, merged, HW, parts, far, eps, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    mean, rstd = _merged(partial, n, group, HW, parts, far, eps, C, G, P, BLOCK_G, BLOCK_B)
    at = merged + n * 2 * G + group
    tl.store(at, mean, mask=group < G)
    tl.store(at + G, rstd, mask=group < G)


@kernel
def _apply_kernel(
    x, shift, weight, bias, statistics, out, HW, parts, far, eps, C: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n, part = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    pixel = tl.arange(0, P)
    inside = pixel < tl.minimum(HW - part * P, P).to(tl.int32)
    start = (n * HW + part * P) * C
    tile = _read(x + start, pixel * C, inside, C, G, P, BLOCK_G, BLOCK_C)
    _all_loads_first()
    group = tl.arange(0, BLOCK_G)
    if BLOCK_B == 0:  # merged before
        at = statistics + n * 2 * G + group
        mean = tl.load(at, mask=group < G, other=0.0)
        rstd = tl.load(at + G, mask=group < G, other=0.0)
    else:
        mean, rstd = _merged(statistics, n, group, HW, parts, far, eps, C, G, P, BLOCK_G, BLOCK_B)
    gain = _vector(weight, C, G, BLOCK_G, BLOCK_C) * rstd[:, None]
    offset = mean[:, None] + tl.zeros((BLOCK_G, BLOCK_C), dtype=tl.float32)
    if HAS_SHIFT:
        offset -= _vector(shift, C, G, BLOCK_G, BLOCK_C)
    offset = _vector(bias, C, G, BLOCK_G, BLOCK_C) - offset * gain
    y = tile.to(tl.float32) * gain[None, :, :] + offset[None, :, :]
    if SILU:
        y = tl.where(inside[:, None, None], y, 0.0)  # or the exponential beyond them may overflow
        y = y / (1.0 + tl.exp(-y))
    y = y.to(out.dtype.element_ty)
    _write(out + start, pixel * C, inside, y, C, G, P, BLOCK_G, BLOCK_C)


class Tiling(NamedTuple):
    """How an image is cut into tiles, as the kernels take it."""

    C: int
    G: int
    pixels: int
    block_g: int
    block_c: int

    @classmethod
    def of(cls, out: Tensor, groups: int) -> Tiling:
        _, C, H, W = out.shape
        block_g, block_c = next_power_of_2(groups), next_power_of_2(C // groups)
        held = MAX_HELD
        if block_g * block_c == C:
            held = 32 * _WARPS * _LOADS * min(C, 16 // out.element_size())
        pixels = max(1, min(held // (block_g * block_c), next_power_of_2(H * W)))
        return cls(C, groups, pixels, block_g, block_c)

    def parts(self, out: Tensor) -> int:
        return -(-out.shape[2] * out.shape[3] // self.pixels)


class Statistics(NamedTuple):
    """Of each image, part and group: the mean and the sum of squared deviations.

    partial (2, N, parts, groups), float32.
    """

    partial: Tensor
    tiling: Tiling

    @classmethod
    def empty(cls, x: Tensor, groups: int) -> Statistics:
        tiling = Tiling.of(x, groups)
        shape = 2, len(x), tiling.parts(x), groups
        return cls(torch.empty(shape, dtype=torch.float32, device=x.device), tiling)


def statistics(x: Tensor, shift: Tensor | None, groups: int) -> Statistics:
    """Of x + shift. x (N, C, H, W), channels-last; shift (C,)."""
    found = Statistics.empty(x, groups)
    N, _, H, W = x.shape
    parts, far = found.partial.shape[2], found.partial[0].numel()
    _statistics_kernel.launch(
        (parts, N), x, x if shift is None else shift, found.partial, H * W, parts, far,
        *found.tiling, shift is not None, num_warps=_WARPS,
    )  # fmt: skip
    return found


def add(
    out: Tensor,
    y: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
    source: int = PLAIN,
    groups: int | None = None,
) -> Statistics | None:
    """Fill out (N, C, H, W), channels-last, with y + shift + residual + residual_shift -> its
    statistics, if it has groups.

    y: as out; (N, 4C, H / 2 + 1, W / 2 + 1) if interleaved, without a residual; (N, C, H / 2, W /
    2) if doubled, as the residual is.
    """
    found = None if groups is None else Statistics.empty(out, groups)
    tiling = _whole(out) if found is None else found.tiling
    N, _, H, W = out.shape
    parts = tiling.parts(out)
    _add_kernel.launch(
        (parts, N), y, y if shift is None else shift, y if residual is None else residual,
        y if residual_shift is None else residual_shift, out,
        y if found is None else found.partial, H * W, W, parts,
        0 if found is None else found.partial[0].numel(), *tiling, source, shift is not None,
        residual is not None, residual_shift is not None, found is not None, num_warps=_WARPS,
    )  # fmt: skip
    return found


def _whole(out: Tensor) -> Tiling:
    """Without groups."""
    C = out.shape[1]
    return Tiling.of(out, C if C & (C - 1) else 1)


def normalise(
    x: Tensor,
    shift: Tensor | None,
    found: Statistics,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """GroupNorm of x + shift by its statistics, and SiLU."""
    N, _, H, W = x.shape
    partial, tiling = found
    parts, groups = partial.shape[2:]
    far, block_b = partial[0].numel(), next_power_of_2(parts)
    if parts > 1 and (parts > _FEW or block_b * tiling.block_g > 32 * _FEW):
        merged = torch.empty(N, 2, groups, dtype=torch.float32, device=x.device)
        block_g = min(8, tiling.block_g)
        _merge_kernel.launch(
            (-(-groups // block_g), N), partial, merged, H * W, parts, far, eps, *tiling[:3],
            block_g, min(block_b, _MERGED // block_g), num_warps=4,
        )  # fmt: skip
        partial, block_b = merged, 0
    out = torch.empty_like(x)
    _apply_kernel.launch(
        (parts, N), x, x if shift is None else shift, weight, bias, partial, out, H * W, parts,
        far, eps, *tiling, block_b, shift is not None, silu, num_warps=_WARPS,
    )  # fmt: skip
    return out
