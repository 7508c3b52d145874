"""The doubling of an image's sides by nearest neighbours, alone and with the 3 x 3 convolution
after it, on channels-last images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._group_norm import DOUBLED, INTERLEAVED, add, normalise
from ._op import op, requested_backend
from ._triton import too_large, too_many_images
from ._tune import Candidates, form
from .arguments import Make, expect_floating, expect_shape, wide
from .group_norm import EPS, unsupported
from .image_blocks import (
    CHANNELS_LAST,
    check_sum,
    column,
    dense,
    expect_norm,
    normal,
    residual_group_norm,
    shifted_sum,
)


def _check_double(
    y: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> None:
    check_sum("double_pixels", y, shift, residual, residual_shift)


def _example_double(make: Make) -> Iterable[tuple[Any, ...]]:
    for i, shape in enumerate(((1, 3, 1, 1), (2, 96, 5, 7), (1, 512, 9, 8))):
        y, other = (make(*shape).to(memory_format=CHANNELS_LAST) for _ in range(2))
        C = shape[1]
        yield (y, make(C), other, make(C) if i == 1 else None) if i else (y,)


@op(
    check=_check_double,
    example=_example_double,
    schema="(Tensor y, Tensor? shift, Tensor? residual, Tensor? residual_shift) -> Tensor",
    memory_format=CHANNELS_LAST,
)
def double_pixels(
    y: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> Tensor:
    """Every pixel four times: of y, or of shifted_sum(y, shift, residual, residual_shift), which is
    then written doubled only.

    y, residual (N, C, H, W), best in channels-last memory; shift, residual_shift (C,) -> (N, C, 2H,
    2W), channels-last.
    """
    x = y if shift is None else shifted_sum.reference(y, shift, residual, residual_shift)
    N, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(N, H, 2, W, 2, C)
    return rows.reshape(N, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


def _no_double(y: Tensor, *_: Any) -> str | None:
    return too_many_images(len(y)) or too_large(4 * y[0].numel())


@double_pixels.backend("triton", unsupported=_no_double)
def _double_triton(
    y: Tensor, shift: Tensor | None, residual: Tensor | None, residual_shift: Tensor | None
) -> Tensor:
    N, C, H, W = y.shape
    out = torch.empty(
        N, C, 2 * H, 2 * W, dtype=y.dtype, device=y.device, memory_format=CHANNELS_LAST
    )
    add(out, *dense(y, shift, residual, residual_shift), DOUBLED)
    return out


# Doubled pixels make equal pairs of rows and of columns, so of a 3 x 3 kernel's rows two always
# meet equal numbers, and their weights can be summed. Which two depends on whether the row is even:
# the first meets the row before, the others this one; or odd: the last meets the row after.


def summed_weights(weight: Tensor) -> Tensor:
    """The weights of four 2 x 2 convolutions, for even and odd rows and columns, which are what a
    doubling and a 3 x 3 convolution are.

    weight (O, C, 3, 3) -> (4 O, C, 2, 2) in its dtype, channels-last; summed in float32 or wider,
    and rounded once.
    """
    w = weight.to(wide(weight))
    rows = (w[:, :, :1], w[:, :, 1:].sum(2, True)), (w[:, :, :2].sum(2, True), w[:, :, 2:])
    parts = []
    for pair in rows:
        half = torch.cat(pair, dim=2)
        parts.append(torch.cat([half[..., :1], half[..., 1:].sum(3, True)], dim=3))
        parts.append(torch.cat([half[..., :2].sum(3, True), half[..., 2:]], dim=3))
    return torch.cat(parts).to(weight.dtype).contiguous(memory_format=CHANNELS_LAST)


def interleave(y: Tensor) -> Tensor:
    """Four images (N, 4C, H + 1, W + 1), as a convolution by `summed_weights` with a padding of 1
    gives them -> (N, C, 2H, 2W).
    """
    (N, _, H, W), C = y.shape, y.shape[1] // 4
    y = y.unflatten(1, (2, 2, C))
    rows = [
        torch.stack([y[:, i, j, :, i : H - 1 + i, j : W - 1 + j] for j in range(2)], dim=-1)
        for i in range(2)
    ]
    return torch.stack(rows, dim=-3).reshape(N, C, 2 * (H - 1), 2 * (W - 1))


def _check_interleaved(
    y: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> None:
    name = "interleaved_group_norm"
    expect_shape(name, "y", y, (None, None, None, None))
    expect_floating(name, y=y, shift=shift, weight=weight, bias=bias)
    if y.shape[1] % 4 or min(y.shape[2:]) < 2:
        raise ValueError(
            f"{name}: y must have four images' channels and sides from 2, got {tuple(y.shape)}"
        )
    C = y.shape[1] // 4
    expect_shape(name, "shift", shift, (C,))
    expect_norm(name, C, weight, bias, groups)


def _example_interleaved(make: Make) -> Iterable[tuple[Any, ...]]:
    for i, (N, C, H, W, groups) in enumerate(
        ((1, 4, 2, 3, 2), (2, 32, 5, 4, 8), (1, 96, 3, 6, 32), (1, 512, 4, 5, 32))
    ):
        y = make(N, 4 * C, H, W).to(memory_format=CHANNELS_LAST)
        yield y, make(C), make(C), make(C), groups, EPS, i % 2 == 1


@op(
    check=_check_interleaved,
    example=_example_interleaved,
    schema="(Tensor y, Tensor shift, Tensor weight, Tensor bias, int groups, float eps, bool silu)"
    " -> (Tensor, Tensor)",
    memory_format=CHANNELS_LAST,
)
def interleaved_group_norm(
    y: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """h = interleave(y) + shift, and GroupNorm of h, and SiLU where asked for -> (h, normalised),
    both (N, C, 2H, 2W) in y's dtype, channels-last.

    y (N, 4C, H + 1, W + 1), best in channels-last memory; shift, weight, bias (C,).
    """
    dtype = wide(y)
    h = interleave(y).to(dtype) + column(shift, dtype)
    h = h.to(y.dtype).contiguous(memory_format=CHANNELS_LAST)
    return h, normal(h.to(dtype), weight, bias, groups, eps, silu).to(h.dtype)


def _no_interleaved(
    y: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any
) -> str | None:
    return unsupported(y[:, : y.shape[1] // 4], groups) or too_large(y[0].numel())


@interleaved_group_norm.backend("triton", unsupported=_no_interleaved)
def _interleaved_triton(
    y: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    N, C, H, W = y.shape
    h = torch.empty(
        N, C // 4, 2 * H - 2, 2 * W - 2, dtype=y.dtype, device=y.device,
        memory_format=CHANNELS_LAST,
    )  # fmt: skip
    y = y.contiguous(memory_format=CHANNELS_LAST)
    found = add(h, y, shift.contiguous(), source=INTERLEAVED, groups=groups)
    assert found is not None
    return h, normalise(h, None, found, weight.contiguous(), bias.contiguous(), eps, silu)


def doubled_convolution(
    total: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    kernel: Tensor,
    summed: Tensor | None,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """h = conv2d(double_pixels(*total), kernel, shift, padding=1), and GroupNorm of h -> (h,
    normalised).

    total: what shifted_sum takes. kernel (O, C, 3, 3). Where summed_weights(kernel) is given,
    "auto" takes the faster on this device of the convolution and of its four parts, which do 16
    multiplications where it does 36, and round differently. The default is the convolution.
    Convolutions are torch's: in float32 they follow torch.backends.cudnn.allow_tf32.
    """
    norm = weight, bias, groups, eps, silu

    def whole(kernel: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(double_pixels(*total), kernel, padding=1)
        return residual_group_norm(y, shift, None, None, *norm)

    def parts(kernel: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(shifted_sum(*total), summed, padding=1)
        return interleaved_group_norm(y, shift, *norm)

    if summed is None or requested_backend() != "auto":
        return whole(kernel, kernel)
    settings = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    forms = [None if t is None else form(t) for t in total]
    question = "doubled_convolution", *forms, form(kernel), groups, *settings
    ways = {"one convolution": whole, "four 2 x 2 convolutions": parts}
    found: tuple[Tensor, Tensor] = Candidates(
        question, ways, total[0].device, (kernel, summed)
    ).run()
    return found
