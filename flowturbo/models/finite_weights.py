"""Weights that are not finite, by name: with one of them every image is black."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checks import listed
from ..storage.files import CheckpointError


def check_finite(
    what: str, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Raise CheckpointError naming the weights with NaN or infinity, and how many numbers they are.

    what: whose weights they are, for the message. dtype: what they are cast to next, if anything:
    numbers that are too large for it count.
    Only weights on the CPU are looked at, where files are read to: one pass without copies, 0.4 s
    for the 675 million of SiT-XL/2 in float32, on one core.
    """
    bad = [name for name, weight in weights.items() if not _finite(weight, dtype)]
    if not bad:
        return

    def counted(name: str) -> str:
        numbers = _readable(weights[name])
        count = int((~numbers.to(dtype or numbers.dtype).isfinite()).sum())
        return f"{name} ({count} of {numbers.numel()})"

    advice = "its training may have diverged: take an earlier checkpoint"
    if dtype is not None and all(_finite(weights[name], None) for name in bad):
        what += f", cast to {dtype},"
        advice = "they are too large for that type: choose dtype bfloat16 or float32"
    raise CheckpointError(
        f"{what} has weights that are NaN or infinite: {listed(bad, 4, counted)}; {advice}"
    )


def _finite(weight: Tensor, dtype: torch.dtype | None) -> bool:
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return True  # quantised weights are of classes of their own
    if weight.layout != torch.strided:
        return True
    if weight.device.type != "cpu" or not weight.numel():
        return True
    # NaN makes both extremes NaN. isfinite() takes fifteen times as long, and a copy.
    extremes = torch.aminmax(_readable(weight.detach()))
    return all(bool(e.to(dtype or e.dtype).isfinite()) for e in extremes)


def _readable(weight: Tensor) -> Tensor:
    """The weight in a type in which torch finds extremes, as it does not in float8."""
    return weight.float() if weight.dtype.itemsize == 1 else weight
