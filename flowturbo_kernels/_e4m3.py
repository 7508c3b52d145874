"""Numbers in e4m3, fp8 with 3 bits of mantissa: their range, a saturating conversion, checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import kernel, next_power_of_2, tl, too_many_rows
from .arguments import expect_shape

LARGEST = 448.0
"""The largest number of e4m3."""
TINY = 1e-12
"""The least scale: a row of zeros stays zeros."""


@kernel
def saturated(y, scale):
    """y over the scale at that address, within e4m3's range; what is no number stays none."""
    return tl.clamp(y * (1.0 / tl.load(scale)), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


def in_e4m3(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, saturated, in e4m3."""
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def no_e4m3(x: Tensor) -> str | None:
    """Why a kernel can't take the rows of x (..., K), or None."""
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "e4m3 needs sm_89 or later"
    if not 1 <= x.shape[-1] <= 16384:
        return f"K must be from 1 to 16384, got {x.shape[-1]}"
    return too_many_rows(x.numel() // x.shape[-1])


def expect_e4m3(op_name: str, **tensors: Tensor) -> None:
    """TypeError unless all tensors are e4m3."""
    for argument, tensor in tensors.items():
        if tensor.dtype != torch.float8_e4m3fn:
            raise TypeError(
                f"{op_name}: {argument} must be torch.float8_e4m3fn (see quantize_rows), got "
                f"{tensor.dtype}"
            )


def expect_scale(op_name: str, argument: str, scale: Tensor, count: int) -> None:
    """TypeError unless the scale is float32; ValueError unless it has so many elements."""
    if scale.dtype != torch.float32:
        raise TypeError(f"{op_name}: {argument} must be torch.float32, got {scale.dtype}")
    expect_shape(op_name, argument, scale, (count,))


def expect_layer(op_name: str, K: int, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
    """ValueError or TypeError unless these are a layer (K -> N) in e4m3 with a scale an output."""
    expect_e4m3(op_name, weight=weight)
    expect_shape(op_name, "weight", weight, (None, K))
    expect_scale(op_name, "weight_scale", weight_scale, len(weight))
    expect_shape(op_name, "bias", bias, (len(weight),))


def ones(count: int, device: torch.device) -> Tensor:
    """(count,) float32: scales of rows that have none, for products that ask for some. Only to be
    read.

    They are made once, and never freed, since captured graphs go on reading them. During a capture
    those from before it are taken; what a capture makes is not kept, as it holds ones only after a
    replay.
    """
    size = next_power_of_2(max(count, 1))
    kept = _ones.get((device, size))
    if kept is None:
        kept = torch.ones(size, dtype=torch.float32, device=device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return kept[:count]
            written = torch.cuda.Event()
            written.record()
            written.synchronize()  # other streams may be the next to read it
        kept = _ones.setdefault((device, size), kept)
    return kept[:count]


_ones: dict[tuple[torch.device, int], Tensor] = {}
