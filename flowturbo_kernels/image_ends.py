"""The ends of an image decoder: latents to what it reads, what it gives to bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._op import op
from ._triton import in_turn, kernel, tl, too_large, too_many_images
from .arguments import Make, expect_floating, expect_shape, wide

CHANNELS_LAST = torch.channels_last
_BLOCK = 1024
"""Numbers of one program."""


@kernel
def _scale_kernel(
    x, out, scale, shift, HW, x_n, x_c, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    in_turn(PDL)
    n = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HW * C
    value = tl.load(x + n * x_n + (at % C) * x_c + at // C, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * HW * C + at, value / scale + shift, mask=inside)


def _check_scale(x: Tensor, scale: float, shift: float, dtype: torch.dtype) -> None:
    expect_shape("unscale_latents", "x", x, (None, None, None, None))
    expect_floating("unscale_latents", x=x)
    if not dtype.is_floating_point:
        raise TypeError(f"unscale_latents: dtype must be floating point, got {dtype}")


def _example_scale(make: Make) -> Iterable[tuple[Any, ...]]:
    for shape in ((1, 4, 8, 8), (3, 4, 9, 5), (2, 16, 32, 32)):
        x = make(*shape)
        yield x, 0.18215, 0.0, torch.bfloat16
        yield x, 0.3611, 0.1159, torch.float32


@op(
    check=_check_scale,
    example=_example_scale,
    schema="(Tensor x, float scale, float shift, ScalarType dtype) -> Tensor",
    memory_format=CHANNELS_LAST,
)
def unscale_latents(x: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    """x / scale + shift, in float32 or wider.

    x (N, C, H, W) -> (N, C, H, W) in dtype, channels-last.
    """
    y = x.to(wide(x)) / scale + shift
    return y.to(dtype).contiguous(memory_format=CHANNELS_LAST)


def _no_scale(x: Tensor, scale: float, shift: float, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is none of float32, float16, bfloat16"
    return too_many_images(len(x)) or too_large(x[0].numel())


@unscale_latents.backend("triton", unsupported=_no_scale)
def _scale_triton(x: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    N, C, H, W = x.shape
    out = torch.empty_like(x, dtype=dtype, memory_format=CHANNELS_LAST)
    _scale_kernel.launch(
        (-(-x[0].numel() // _BLOCK), N), x, out, scale, shift, H * W, C * H * W, H * W, C, _BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


@kernel
def _bytes_kernel(x, out, numbers, BLOCK: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    n = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n * numbers + at, mask=at < numbers, other=0.0).to(tl.float32)
    value = 127.5 * value + 128.0
    value = tl.where(value > 0.0, tl.where(value < 255.0, value, 255.0), 0.0)
    tl.store(out + n * numbers + at, value.to(tl.uint8), mask=at < numbers)


def _check_bytes(x: Tensor) -> None:
    expect_shape("image_bytes", "x", x, (None, None, None, None))
    expect_floating("image_bytes", x=x)


def _example_bytes(make: Make) -> Iterable[tuple[Any, ...]]:
    for shape in ((1, 3, 8, 8), (3, 3, 17, 5), (2, 1, 40, 40)):
        yield (make(*shape).to(memory_format=CHANNELS_LAST),)


@op(check=_check_bytes, example=_example_bytes, schema="(Tensor x) -> Tensor")
def image_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> 0 to 255, by 127.5 x + 128, clamped, cut to whole numbers.

    x (N, C, H, W), best in channels-last memory -> (N, H, W, C), uint8, in one piece if x is
    channels-last. The published SiT scores were computed with this rounding. NaN gives any byte.
    """
    return (127.5 * x.to(wide(x)) + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _no_bytes(x: Tensor) -> str | None:
    return too_many_images(len(x)) or too_large(x[0].numel())


@image_bytes.backend("triton", unsupported=_no_bytes)
def _bytes_triton(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    x = x.contiguous(memory_format=CHANNELS_LAST)
    out = torch.empty(N, H, W, C, dtype=torch.uint8, device=x.device)
    numbers = C * H * W
    grid = -(-numbers // (4 * _BLOCK)), N
    # Product and sum round separately, as torch's do, so that bytes are the same.
    options = {"num_warps": 4, "enable_fp_fusion": False}
    _bytes_kernel.launch(grid, x, out, numbers, 4 * _BLOCK, **options)
    return out
