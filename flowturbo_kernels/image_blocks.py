"""What stands between the convolutions of an image decoder, on channels-last images: bias, residual
and GroupNorm in the passes that they need together.

A convolution without its bias is followed by one of these. Where another GroupNorm is next, the
bias is never added in memory: statistics and normalisation add it to what they read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._group_norm import PLAIN, add, normalise
from ._op import op
from ._triton import too_large, too_many_images
from .arguments import Make, expect_floating, expect_shape, wide
from .group_norm import EPS, normalised, unsupported

CHANNELS_LAST = torch.channels_last


def expect_norm(name: str, C: int, weight: Tensor, bias: Tensor, groups: int) -> None:
    if groups < 1 or C % groups:
        raise ValueError(f"{name}: groups must divide the {C} channels, got {groups}")
    expect_shape(name, "weight", weight, (C,))
    expect_shape(name, "bias", bias, (C,))


def _images(make: Make) -> Iterable[tuple[Tensor, int]]:
    """Images in channels-last memory, and groups."""
    for N, C, H, W, groups in (
        (1, 4, 2, 2, 2),
        (2, 32, 8, 8, 8),
        (2, 96, 5, 7, 32),
        (1, 512, 12, 20, 32),
        (1, 128, 72, 60, 32),
    ):
        yield make(N, C, H, W).to(memory_format=CHANNELS_LAST), groups


# GroupNorm after a convolution's bias


def _check_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> None:
    name = "shifted_group_norm"
    expect_shape(name, "x", x, (None, None, None, None))
    expect_floating(name, x=x, weight=weight, bias=bias)
    if shift is not None:
        expect_floating(name, x=x, shift=shift)
        expect_shape(name, "shift", shift, (x.shape[1],))
    expect_norm(name, x.shape[1], weight, bias, groups)


def _example_norm(make: Make) -> Iterable[tuple[Any, ...]]:
    for i, (x, groups) in enumerate(_images(make)):
        C = x.shape[1]
        yield x, make(C) if i % 3 else None, make(C), make(C), groups, EPS, i % 2 == 1


@op(
    check=_check_norm,
    example=_example_norm,
    schema="(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, bool silu)"
    " -> Tensor",
    memory_format=CHANNELS_LAST,
)
def shifted_group_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> Tensor:
    """GroupNorm(x + shift), where shift is the bias of the convolution that made x, and SiLU where
    asked for: statistics over each group's channels and all pixels of an image.

    x (N, C, H, W), best in channels-last memory; shift, weight, bias (C,) -> (N, C, H, W) in x's
    dtype, channels-last. All in float32 or wider; the sum is not rounded.
    """
    total = x.to(wide(x)) if shift is None else x.to(wide(x)) + column(shift, wide(x))
    return normal(total, weight, bias, groups, eps, silu).to(x.dtype)


def column(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, None, None]


def normal(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """In x's dtype, channels-last."""
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return (F.silu(y) if silu else y).contiguous(memory_format=CHANNELS_LAST)


def _no_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, *_: Any
) -> str | None:
    return unsupported(x, groups)


@shifted_group_norm.backend("triton", unsupported=_no_norm)
def _norm_triton(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    return normalised(x, weight, bias, groups, eps, shift, silu)


# The residual stream: written once, with the statistics of the GroupNorm after it


def check_sum(
    name: str,
    y: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    residual_shift: Tensor | None,
) -> None:
    """Raise unless these can be summed."""
    expect_shape(name, "y", y, (None, None, None, None))
    expect_floating(name, y=y)
    if shift is not None:
        expect_floating(name, y=y, shift=shift)
        expect_shape(name, "shift", shift, (y.shape[1],))
    elif residual is not None:
        raise ValueError(f"{name}: residual needs a shift, and there is none")
    if residual is not None:
        expect_floating(name, y=y, residual=residual)
        expect_shape(name, "residual", residual, tuple(y.shape))
    if residual_shift is not None:
        if residual is None:
            raise ValueError(f"{name}: residual_shift needs a residual, and there is none")
        expect_floating(name, y=y, residual_shift=residual_shift)
        expect_shape(name, "residual_shift", residual_shift, (y.shape[1],))


def _check_sum(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> None:
    check_sum("shifted_sum", y, shift, residual, residual_shift)


def _example_sum(make: Make) -> Iterable[tuple[Any, ...]]:
    for i, (y, _) in enumerate(_images(make)):
        other, C = make(*y.shape).to(memory_format=CHANNELS_LAST), y.shape[1]
        yield y, make(C), other if i else None, make(C) if i % 2 else None


@op(
    check=_check_sum,
    example=_example_sum,
    schema="(Tensor y, Tensor shift, Tensor? residual, Tensor? residual_shift) -> Tensor",
    memory_format=CHANNELS_LAST,
)
def shifted_sum(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> Tensor:
    """y + shift, the convolution's bias, plus residual + residual_shift, where there are: the
    input of a residual block, or what its convolution without bias made of it, and that bias.

    y, residual (N, C, H, W), best in channels-last memory; shift, residual_shift (C,) -> (N, C, H,
    W) in y's dtype, channels-last; summed in float32 or wider, and rounded once.
    """
    dtype = wide(y)
    total = y.to(dtype) + column(shift, dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    if residual_shift is not None:
        total = total + column(residual_shift, dtype)
    return total.to(y.dtype).contiguous(memory_format=CHANNELS_LAST)


def _no_sum(y: Tensor, *_: Any) -> str | None:
    return too_many_images(len(y)) or too_large(y[0].numel())


@shifted_sum.backend("triton", unsupported=_no_sum)
def _sum_triton(
    y: Tensor, shift: Tensor, residual: Tensor | None, residual_shift: Tensor | None
) -> Tensor:
    out = torch.empty_like(y, memory_format=CHANNELS_LAST)
    add(out, *dense(y, shift, residual, residual_shift))
    return out


def dense(
    y: Tensor,
    shift: Tensor | None,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return (
        y.contiguous(memory_format=CHANNELS_LAST),
        None if shift is None else shift.contiguous(),
        None if residual is None else residual.contiguous(memory_format=CHANNELS_LAST),
        None if residual_shift is None else residual_shift.contiguous(),
    )


def _check_seam(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> None:
    name = "residual_group_norm"
    check_sum(name, y, shift, residual, residual_shift)
    expect_floating(name, y=y, weight=weight, bias=bias)
    expect_norm(name, y.shape[1], weight, bias, groups)


def _example_seam(make: Make) -> Iterable[tuple[Any, ...]]:
    cases = zip(_images(make), _example_sum(make), strict=True)
    for i, ((_, groups), args) in enumerate(cases):
        C = args[0].shape[1]
        yield *args, make(C), make(C), groups, EPS, i % 2 == 1


@op(
    check=_check_seam,
    example=_example_seam,
    schema="(Tensor y, Tensor shift, Tensor? residual, Tensor? residual_shift, Tensor weight, "
    "Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor)",
    memory_format=CHANNELS_LAST,
)
def residual_group_norm(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The seam between two residual blocks: h = shifted_sum(y, shift, residual, residual_shift),
    and GroupNorm of h, and SiLU where asked for -> (h, normalised), both as h.

    The first pass writes h and takes its statistics, so nothing reads h for them.
    """
    h = shifted_sum.reference(y, shift, residual, residual_shift)
    return h, normal(h.to(wide(h)), weight, bias, groups, eps, silu).to(h.dtype)


def _no_seam(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *_: Any,
) -> str | None:
    return unsupported(y, groups) or _no_sum(y)


@residual_group_norm.backend("triton", unsupported=_no_seam)
def _seam_triton(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    h = torch.empty_like(y, memory_format=CHANNELS_LAST)
    found = add(h, *dense(y, shift, residual, residual_shift), PLAIN, groups)
    assert found is not None
    return h, normalise(h, None, found, weight.contiguous(), bias.contiguous(), eps, silu)
