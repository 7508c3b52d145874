"""Latents to tokens: the patch embedding, of x alone or of x and a velocity."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import op
from ._triton import (
    MAX_IMAGES,
    dot_precision,
    in_turn,
    kernel,
    next_power_of_2,
    tl,
    too_large,
    too_many_images,
)
from .arguments import Make, expect_floating, expect_one_dtype, expect_shape, wide
from .batch_invariant import matmul, multiplied
from .velocity_update import check_velocities

_FEATURES = 32
"""Of one program, in float32: more would spill, outside the tensor cores. In 16 bits twice as many.
"""

# Triton: one program per block of tokens and block of features; element k = (channel, row, column)
# of a patch is read in place, from x or from v. Tokens of x alone are stored for both halves of
# guidance.


@kernel
def _patch_kernel(
    x, v, ahead, weight, bias, positions, out, step, x_rows, tokens, columns,
    x_b, x_c, x_h, x_w, v_b, v_c, v_h, v_w, ahead_b, ahead_c, ahead_h, ahead_w,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, P: tl.constexpr, HAS_V: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, AHEAD: tl.constexpr, COPIES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = (token // columns) * P, (token % columns) * P
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        c, i, j = k // (P * P), (k // P) % P, k % P
        inside = (token < tokens)[:, None] & (k < K)[None, :]
        h, w = row[:, None] + i[None, :], column[:, None] + j[None, :]
        of_x = inside & (c < C)[None, :]
        at = (b % x_rows) * x_b + c[None, :] * x_c + h * x_h + w * x_w
        patches = tl.load(x + at, mask=of_x, other=0.0)
        if AHEAD:
            at = (b % x_rows) * ahead_b + c[None, :] * ahead_c + h * ahead_h + w * ahead_w
            moved = step * tl.load(ahead + at, mask=of_x, other=0.0).to(tl.float32)
            patches = patches.to(tl.float32) + moved
        patches = patches.to(weight.dtype.element_ty)
        if HAS_V:
            at = b * v_b + (c - C)[None, :] * v_c + h * v_h + w * v_w
            patches += tl.load(v + at, mask=inside & (c >= C)[None, :], other=0.0).to(
                weight.dtype.element_ty
            )
        kernels = tl.load(
            weight + feature[None, :] * K + k[:, None],
            mask=(feature < D)[None, :] & (k < K)[:, None],
            other=0.0,
        )
        total = tl.dot(patches, kernels, total, input_precision=PRECISION)
    total += tl.load(bias + feature, mask=feature < D, other=0.0).to(tl.float32)[None, :]
    inside = (token < tokens)[:, None] & (feature < D)[None, :]
    at = token[:, None] * D + feature[None, :]
    if HAS_POSITIONS:
        total += tl.load(positions + at, mask=inside, other=0.0).to(tl.float32)
    for copy in tl.static_range(COPIES):
        tl.store(out + (b + copy * x_rows) * tokens * D + at, total, mask=inside)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None = None,
    positions: Tensor | None = None,
    copies: int = 1,
    ahead: Tensor | None = None,
    step: float = 0.0,
) -> None:
    expect_floating("patch_embed", x=x, weight=weight, bias=bias)
    expect_one_dtype("patch_embed", weight=weight, bias=bias)
    expect_shape("patch_embed", "x", x, (None, None, None, None))
    channels = x.shape[1]
    if v is not None:
        expect_floating("patch_embed", x=x, v=v)
        expect_shape("patch_embed", "v", v, (None, *x.shape[1:]))
        if not len(x) or len(v) % len(x):
            raise ValueError(
                f"patch_embed: v must have a multiple of the {len(x)} rows of x, got {len(v)}"
            )
        channels *= 2
    if not 1 <= copies <= (2 if v is None else 1):
        raise ValueError(f"patch_embed: copies must be 1, or 2 without v, got {copies}")
    if ahead is not None:
        check_velocities("patch_embed", x, [ahead])
    expect_shape("patch_embed", "weight", weight, (None, channels, None, None))
    expect_shape(
        "patch_embed", "weight", weight, (None, channels, weight.shape[2], weight.shape[2])
    )
    expect_shape("patch_embed", "bias", bias, (weight.shape[0],))
    p = weight.shape[2]
    if x.shape[2] % p or x.shape[3] % p:
        raise ValueError(
            f"patch_embed: x's height and width must be multiples of the patch {p}, got "
            f"{tuple(x.shape)}"
        )
    if positions is not None:
        expect_floating("patch_embed", x=x, positions=positions)
        expect_one_dtype("patch_embed", weight=weight, positions=positions)
        expect_shape(
            "patch_embed",
            "positions",
            positions,
            ((x.shape[2] // p) * (x.shape[3] // p), weight.shape[0]),
        )


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for B, C, side, p, D in (
        (1, 1, 8, 2, 16),
        (2, 4, 8, 2, 72),
        (3, 4, 16, 4, 96),
        (1, 4, 32, 8, 384),
    ):
        yield make(B, C, side, side), make(D, C, p, p) / p, make(D), None
        yield (
            make(B, C, side, side),
            make(D, 2 * C, p, p) / p,
            make(D),
            make(2 * B, C, side, side),
            make((side // p) ** 2, D),
        )
        predictor = make(B, C, side, side), make(D, C, p, p) / p, make(D), None
        yield *predictor, make((side // p) ** 2, D), 2, make(2 * B, C, side, side), 0.25


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? v, Tensor? positions, int copies, "
    "Tensor? ahead, float step) -> Tensor",
)
def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None = None,
    positions: Tensor | None = None,
    copies: int = 1,
    ahead: Tensor | None = None,
    step: float = 0.0,
) -> Tensor:
    """Cut images into p x p patches and project each.

    x (B, C, H, W); weight (D, C, p, p), or (D, 2C, p, p) with v as the second C channels; v (k * B,
    C, H, W), whose k parts all go with x; bias (D,); positions (T, D), T = H/p * W/p, to be added;
    copies: 2, without v, for the same tokens twice, as both halves of guidance; ahead (B or more,
    C, H, W), whose first B rows times `step` move x before it is cut -> (copies * B or k * B, T,
    D), patches row by row, in the weight's dtype, to which x, moved, and v are rounded.
    """
    if ahead is not None:
        x = x.to(wide(x)) + step * ahead.narrow(0, 0, len(x)).to(wide(x))
    both = (
        x if v is None else torch.cat([x.repeat(len(v) // len(x), 1, 1, 1), v.to(x.dtype)], dim=1)
    )
    tokens = _projected(both.to(weight.dtype), weight, bias)
    tokens = tokens if positions is None else tokens + positions
    return tokens if copies == 1 else tokens.repeat(copies, 1, 1)


def _projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W) -> (B, T, D). Off the CPU as a matrix product: by torch's default cuDNN
    convolves float32 in TF32, with errors of 1e-4, but does not multiply matrices in it.
    """
    if _convolves(x):
        convolve = functools.partial(F.conv2d, stride=weight.shape[2])
        return multiplied(convolve, x, weight, bias).flatten(2).transpose(1, 2)
    (B, C, H, W), p = x.shape, weight.shape[2]
    patches = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return matmul(patches.reshape(B, (H // p) * (W // p), C * p * p), weight.flatten(1), bias)


def _convolves(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    positions: Tensor | None,
    copies: int,
    ahead: Tensor | None,
    step: float,
) -> str | None:
    same = weight.dtype == bias.dtype and (positions is None or positions.dtype == weight.dtype)
    mixed = None if same else "weight, bias and positions are of several dtypes, under autocast"
    D, p = weight.shape[0], weight.shape[2]
    most = MAX_IMAGES * _FEATURES  # blocks of features are the grid's second axis
    if most < D:
        return f"at most {most} features, got {D}"
    tokens = x.shape[2] // p * (x.shape[3] // p)
    return (
        mixed
        or too_many_images(len(x if v is None else v))
        or too_large(max(D * tokens, weight.numel(), _span(x), _span(v), _span(ahead)))
    )


def _span(x: Tensor | None) -> int:
    """The distance in memory from an image's first number to its last, and 1."""
    if x is None:
        return 0
    axes = zip(x.shape[1:], x.stride()[1:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in axes)


@patch_embed.backend("triton", unsupported=_unsupported)
def _patch_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    positions: Tensor | None,
    copies: int,
    ahead: Tensor | None,
    step: float,
) -> Tensor:
    x_rows, C, H, W = x.shape
    B = x_rows if v is None else len(v)
    D, _, p, _ = weight.shape
    tokens, K = (H // p) * (W // p), weight[0].numel()
    out = torch.empty(copies * B, tokens, D, dtype=weight.dtype, device=x.device)
    most = _FEATURES if weight.dtype == torch.float32 else 2 * _FEATURES
    block_t, block_d, block_k = 32, most, max(16, min(most, next_power_of_2(K)))
    _patch_kernel.launch(
        (-(-tokens // block_t), -(-D // block_d), B),
        x, x if v is None else v, x if ahead is None else ahead, weight.contiguous(),
        bias.contiguous(), bias if positions is None else positions.contiguous(), out,
        float(step), x_rows, tokens, W // p,
        *x.stride(), *(x if v is None else v).stride(), *(x if ahead is None else ahead).stride(),
        D, K, C, p, v is not None, positions is not None, ahead is not None, copies,
        dot_precision(weight), block_t, block_d, block_k, num_warps=4,
    )  # fmt: skip
    return out
