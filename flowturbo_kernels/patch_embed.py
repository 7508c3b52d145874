"""Latents to tokens: the patch embedding, of x alone or of x and a velocity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Make, expect_floating, expect_one_dtype, expect_shape, op


def _check(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None = None) -> None:
    expect_floating("patch_embed", x=x, weight=weight, bias=bias)
    expect_one_dtype("patch_embed", x=x, weight=weight, bias=bias)
    expect_shape("patch_embed", "x", x, (None, None, None, None))
    channels = x.shape[1]
    if v is not None:
        expect_floating("patch_embed", x=x, v=v)
        expect_one_dtype("patch_embed", x=x, v=v)
        expect_shape("patch_embed", "v", v, tuple(x.shape))
        channels *= 2
    expect_shape("patch_embed", "weight", weight, (None, channels, None, None))
    expect_shape("patch_embed", "weight", weight, (None, channels, weight.shape[2], weight.shape[2]))
    expect_shape("patch_embed", "bias", bias, (weight.shape[0],))
    p = weight.shape[2]
    if x.shape[2] % p or x.shape[3] % p:
        raise ValueError(f"patch_embed: x's height and width must be multiples of the patch {p}, got {tuple(x.shape)}")


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for B, C, side, p, D in ((1, 1, 8, 2, 16), (2, 4, 8, 2, 72), (3, 4, 16, 4, 96), (1, 4, 32, 8, 384)):
        yield make(B, C, side, side), make(D, C, p, p) / p, make(D), None
        yield make(B, C, side, side), make(D, 2 * C, p, p) / p, make(D), make(B, C, side, side)


@op(check=_check, example=_example)
def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None = None) -> Tensor:
    """Cut into p x p patches and project each.

    x (B, C, H, W); weight (D, C, p, p), or (D, 2C, p, p) with v (B, C, H, W) as the second C channels; bias (D,)
    -> (B, H/p * W/p, D), patches row by row.
    """
    both = x if v is None else torch.cat([x, v], dim=1)
    return F.conv2d(both, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)
