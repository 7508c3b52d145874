"""The two operations around a solver step that are not the network's: guidance, and moving x along velocities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._op import Make, expect_floating, expect_shape, op, wide


def _check(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> None:
    if not velocities or len(velocities) != len(weights):
        raise ValueError(
            f"velocity_update: weights must be as many as velocities, and at least one, got {len(weights)} and {len(velocities)}"
        )
    for k, v in enumerate(velocities):
        expect_floating("velocity_update", x=x, **{f"velocities[{k}]": v})
        if v.shape[1:] != x.shape[1:] or len(v) < len(x):
            raise ValueError(
                f"velocity_update: velocities[{k}] must have at least the rows of x {tuple(x.shape)}, got {tuple(v.shape)}"
            )


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    yield make(1, 1, 8, 8), [make(1, 1, 8, 8)], [0.1]
    yield make(2, 4, 8, 8), [make(4, 4, 8, 8), make(4, 4, 8, 8)], [0.05, 0.05]
    yield make(3, 4, 5, 7), [make(3, 4, 5, 7) for _ in range(4)], [0.2, -0.1, 0.03, -0.01]


@op(check=_check, example=_example)
def velocity_update(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """x plus the weighted velocities: every explicit step that moves x is one call of this.

    x (N, ...); velocities: each (N or more, ...), of which the first N rows are read; weights: floats, with the step size in them
    -> (N, ...) in x's dtype.
    """
    N, dtype = len(x), wide(x, *velocities)
    total = x.to(dtype)
    for v, weight in zip(velocities, weights, strict=True):
        total = total + weight * v[:N].to(dtype)
    return total.to(x.dtype)


def _check_guide(v: Tensor, scale: float | Tensor, channels: int) -> None:
    expect_floating("guide", v=v)
    expect_shape("guide", "v", v, (None, None, None, None))
    if v.shape[0] % 2:
        raise ValueError(f"guide: v must hold a conditional and an unconditional half, got {v.shape[0]} rows")
    if isinstance(scale, Tensor):
        expect_shape("guide", "scale", scale, (v.shape[0] // 2, 1, 1, 1))
    if not 1 <= channels <= v.shape[1]:
        raise ValueError(f"guide: channels must be from 1 to {v.shape[1]}, got {channels}")


def _example_guide(make: Make) -> Iterable[tuple[Any, ...]]:
    yield make(2, 1, 8, 8), 2.0, 1
    yield make(4, 4, 8, 8), 1.5, 3
    yield make(6, 4, 5, 7), 4.0, 4
    yield make(6, 4, 5, 7), make(3, 1, 1, 1), 3


@op(check=_check_guide, example=_example_guide)
def guide(v: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """Classifier-free guidance of a velocity or of an offset.

    v (2N, C, H, W), conditional rows first -> the same shape: the first `channels` channels become u + scale * (c - u) in both
    halves, the others keep their own half's value. scale: a number, or (N, 1, 1, 1) for one an image.
    """
    c, u = v[:, :channels].to(wide(v)).chunk(2)
    guided = (u + scale * (c - u)).to(v.dtype)
    return torch.cat([torch.cat([guided, guided]), v[:, channels:]], dim=1)
