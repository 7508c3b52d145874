"""The matrix product that linear's kernels share: tiles in an order that reuses the L2 cache, and
split-K where tiles are few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._e4m3 import saturated
from ._triton import dot_precision, in_turn, kernel, tl


class Tile(NamedTuple):
    """One program's part of the output, rows x columns, reading K in pieces of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
)
WIDE_TILES = (*TILES, Tile(128, 256, 64, 8, 3))
"""For products without a residual: with one, the last tile spills."""
MASKED_TILES = (Tile(32, 64, 32, 4, 2),)
"""For a K that is not a multiple of 64, which no published model has: masks take registers."""
EXACT_TILES = (Tile(32, 32, 32, 4, 2),)
"""For float32, which does not use the tensor cores."""
FP8_TILES = (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4))
FP8_SMALL_TILES = (Tile(64, 64, 128, 4, 4),)
"""For a residual in float32, with which the others spill."""
SPLITS = (1, 2, 4)
"""Parts of K, each summed by its own program; a second kernel adds the parts, always in the same
order, and applies the epilogue.
"""
_GROUP = 8


@kernel
def gelu(y):
    """0.5 * y * (1 + tanh(u)) = y * sigmoid(2u)."""
    u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
    e = tl.exp(-2.0 * tl.abs(u))  # never overflows
    return y * tl.where(u >= 0, 1.0, e) / (1.0 + e)


@kernel
def _epilogue(
    y, m, n, M, N, T, x_scale, weight_scale, bias, residual, gate, out_scale, gate_b,
    SCALED: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Scales (1: of columns, 2: of rows too), bias, activation, gate and residual of a tile y at
    rows m and columns n; over the results' scale if they are e4m3.
    """
    if SCALED:
        scales = tl.load(weight_scale + n, mask=n < N, other=0.0)[None, :]
        if SCALED == 2:
            scales = tl.load(x_scale + m, mask=m < M, other=0.0)[:, None] * scales
        y *= scales
    y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    if RESIDUAL:
        inside = (m < M)[:, None] & (n < N)[None, :]
        image = (m // T).to(tl.int64)[:, None]
        g = tl.load(gate + image * gate_b + n[None, :], mask=inside, other=0.0).to(tl.float32)
        y = (
            tl.load(residual + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            + g * y
        )
    if QUANTIZED:
        y = saturated(y, out_scale)
    return y


@kernel
def _product_kernel(
    x, weight, x_scale, weight_scale, bias, residual, gate, out_scale, out, M, N, T, x_m, weight_n,
    gate_b, K: tl.constexpr,
    SCALED: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, QUANTIZED: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, part = tl.program_id(0), tl.program_id(1)
    group = tile // (GROUP * tiles_n)  # GROUP rows of tiles at a time, column by column
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = tile % (GROUP * tiles_n)
    m = (group * GROUP + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inner // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    PART: tl.constexpr = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    # Rows and columns beyond the end wrap around, and are not stored.
    x_rows = x + (m % M).to(tl.int64)[:, None] * x_m
    weight_rows = weight + (n % N).to(tl.int64)[None, :] * weight_n
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, PART, BLOCK_K):
        k = part * PART + start + tl.arange(0, BLOCK_K)
        if K % (BLOCK_K * SPLIT) == 0:
            a = tl.load(x_rows + k[None, :])
            b = tl.load(weight_rows + k[:, None])
        else:
            a = tl.load(x_rows + k[None, :], mask=(k < K)[None, :], other=0.0)
            b = tl.load(weight_rows + k[:, None], mask=(k < K)[:, None], other=0.0)
        y = tl.dot(a, b, y, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT > 1:
        tl.store(out + part.to(tl.int64) * M * N + at, y, mask=inside)
    else:
        y = _epilogue(
            y, m, n, M, N, T, x_scale, weight_scale, bias, residual, gate, out_scale, gate_b,
            SCALED, GELU, RESIDUAL, QUANTIZED,
        )  # fmt: skip
        tl.store(out + at, y, mask=inside)


@kernel
def _sum_kernel(
    parts, x_scale, weight_scale, bias, residual, gate, out_scale, out, M, N, T, gate_b,
    SCALED: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, QUANTIZED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in tl.static_range(SPLIT):
        y += tl.load(parts + at, mask=inside, other=0.0)
        parts += tl.cast(M, tl.int64) * N
    y = _epilogue(
        y, m, n, M, N, T, x_scale, weight_scale, bias, residual, gate, out_scale, gate_b, SCALED,
        GELU, RESIDUAL, QUANTIZED,
    )  # fmt: skip
    tl.store(out + at, y, mask=inside)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tile: Tile,
    split: int = 1,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    tokens: int = 1,
    scales: tuple[Tensor | None, Tensor] | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """x (M, K), rows may be strided, times weight (N, K) transposed, with the epilogue -> (M, N) in
    bias's dtype, or residual's.

    residual (M, N), dense, and gate (M / tokens, N): together or not at all. scales: of the rows of
    x, if there are any, and of weight, float32 (M,) and (N,), for operands in fp8. out_scale,
    float32 (1,): the result is e4m3, and stands for itself times the scale.
    """
    (M, K), N = x.shape, len(weight)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    dtype = bias.dtype if residual is None else residual.dtype
    dtype = dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(M, N, dtype=dtype, device=x.device)
    parts = out if split == 1 else torch.empty(split, M, N, dtype=torch.float32, device=x.device)
    bias = bias.contiguous()
    x_scale, weight_scale = (None if t is None else t.contiguous() for t in scales or (None, None))
    optional = x_scale, weight_scale, bias, residual, gate, out_scale
    epilogue = tuple(bias if t is None else t for t in optional)
    scaled = 0 if scales is None else 1 if x_scale is None else 2
    what = scaled, gelu, residual is not None, out_scale is not None
    gate_b = 0 if gate is None else gate.stride(0)
    _product_kernel.launch(
        (-(-M // tile.rows) * -(-N // tile.columns), split),
        x, weight, *epilogue, parts, M, N, tokens, x.stride(0), weight.stride(0), gate_b,
        K, *what, split, _GROUP, dot_precision(x), tile.rows, tile.columns, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        grid = -(-M // 16), -(-N // 128)
        _sum_kernel.launch(
            grid, parts, *epilogue, out, M, N, tokens, gate_b, *what, split, 16, 128, num_warps=4
        )  # fmt: skip
    return out
