"""Classifier-free guidance; and all of a solver step that follows its network, in one pass:
guidance, base velocity, cache write and the update of x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cuda
from ._op import op
from ._triton import in_turn, kernel, next_power_of_2, tl, too_large, too_many_images
from .arguments import Make, expect_floating, expect_shape, wide
from .velocity_update import (
    BLOCK,
    add_velocities,
    check_velocities,
    cuda_call,
    pad_velocities,
    too_many_velocities,
    velocity_update,
)

# Triton: one program per block of one image's elements; offsets n * S + i of dense tensors, S
# elements per image.


@kernel
def _guided(v, scale, n, N, i, mask, S, HW, channels):
    """Both halves of the guided velocity at elements i of image n."""
    at = n.to(tl.int64) * S + i
    c = tl.load(v + at, mask=mask).to(tl.float32)
    u = tl.load(v + (n + N).to(tl.int64) * S + i, mask=mask).to(tl.float32)
    guided = u + tl.load(scale + n).to(tl.float32) * (c - u)
    inside = i // HW < channels
    return tl.where(inside, guided, c), tl.where(inside, guided, u)


@kernel
def _guide_kernel(v, scale, out, N, S, HW, channels, BLOCK: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    n, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < S
    c, u = _guided(v, scale, n, N, i, mask, S, HW, channels)
    at = n.to(tl.int64) * S + i
    tl.store(out + at, c, mask=mask)
    tl.store(out + (n + N).to(tl.int64) * S + i, u, mask=mask)


@kernel
def _guided_update_kernel(
    x, raw, scale, base, v0, v1, v2, v3, out, velocity, weight, w0, w1, w2, w3, N, S, HW, channels,
    GUIDED: tl.constexpr, BASE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < S
    at = n.to(tl.int64) * S + i
    other_half = (n + N).to(tl.int64) * S + i
    total = add_velocities(x, v0, v1, v2, v3, w0, w1, w2, w3, at, mask, COUNT)
    if GUIDED:
        c, u = _guided(raw, scale, n, N, i, mask, S, HW, channels)
        if BASE:
            u += tl.load(base + other_half, mask=mask).to(tl.float32)
        tl.store(velocity + other_half, u, mask=mask)
    else:
        c = tl.load(raw + at, mask=mask).to(tl.float32)
    if BASE:
        c += tl.load(base + at, mask=mask).to(tl.float32)
    tl.store(velocity + at, c, mask=mask)
    tl.store(out + at, total + weight * c, mask=mask)


def _check_guide(v: Tensor, scale: float | Tensor, channels: int) -> None:
    expect_floating("guide", v=v)
    _check_halves("guide", "v", v, scale, channels)


def _check_halves(
    op_name: str, argument: str, v: Tensor, scale: float | Tensor, channels: int
) -> None:
    expect_shape(op_name, argument, v, (None, None, None, None))
    if v.shape[0] % 2:
        raise ValueError(
            f"{op_name}: {argument} must hold a conditional and an unconditional half, got "
            f"{v.shape[0]} rows"
        )
    if isinstance(scale, Tensor):
        expect_shape(op_name, "scale", scale, (v.shape[0] // 2, 1, 1, 1))
    if not 1 <= channels <= v.shape[1]:
        raise ValueError(f"{op_name}: channels must be from 1 to {v.shape[1]}, got {channels}")


def _example_guide(make: Make) -> Iterable[tuple[Any, ...]]:
    yield make(2, 1, 8, 8), 2.0, 1
    yield make(4, 4, 8, 8), 1.5, 3
    yield make(6, 4, 5, 7), 4.0, 4
    yield make(6, 4, 5, 7), make(3, 1, 1, 1), 3


def scale_per_image(v: Tensor, scale: float | Tensor) -> Tensor:
    """The scale as a dense tensor (N,), one number per image, float32 or wider."""
    if isinstance(scale, Tensor):
        return scale.reshape(-1).contiguous()
    return torch.full((v.shape[0] // 2,), scale, dtype=wide(v), device=v.device)


def _as_tensor(v: Tensor, scale: float | Tensor) -> Tensor:
    return scale_per_image(v, scale).view(-1, 1, 1, 1)


@op(
    check=_check_guide,
    example=_example_guide,
    schema="(Tensor v, Tensor scale, int channels) -> Tensor",
    lower=lambda v, scale, channels: (v, _as_tensor(v, scale), channels),
)
def guide(v: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """Classifier-free guidance of a velocity or of an offset.

    v (2N, C, H, W), conditional rows first -> the same shape: the first `channels` channels become
    u + scale * (c - u) in both halves, the others keep their own half's value. scale: a number, or
    (N, 1, 1, 1) for one an image.
    """
    c, u = v[:, :channels].to(wide(v)).chunk(2)
    guided = (u + scale * (c - u)).to(v.dtype)
    return torch.cat([torch.cat([guided, guided]), v[:, channels:]], dim=1)


@guide.backend(
    "triton", unsupported=lambda v, *_: too_many_images(len(v) // 2) or too_large(v[:1].numel())
)
def _guide_triton(v: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    v = v.contiguous()
    N, S, HW = len(v) // 2, v[0].numel(), v[0, 0].numel()
    out = torch.empty_like(v)
    block = min(BLOCK, next_power_of_2(S))
    _guide_kernel.launch(
        (-(-S // block), N), v, scale_per_image(v, scale), out, N, S, HW, channels, block
    )
    return out


def _check_guided(
    x: Tensor, raw: Tensor, scale: float | Tensor | None, channels: int, weight: float,
    base: Tensor | None = None, velocities: Sequence[Tensor] = (), weights: Sequence[float] = (),
) -> None:  # fmt: skip
    check_guided("guided_update", x, raw, scale, channels, base, velocities, weights)


def check_guided(
    name: str, x: Tensor, raw: Tensor, scale: float | Tensor | None, channels: int,
    base: Tensor | None, velocities: Sequence[Tensor], weights: Sequence[float],
) -> None:  # fmt: skip
    """The checks of guided_update, in the name of the op that calls this."""
    expect_shape(name, "x", x, (None, None, None, None))
    expect_floating(name, x=x, raw=raw)
    if scale is None:
        expect_shape(name, "raw", raw, tuple(x.shape))
    else:
        expect_shape(name, "raw", raw, (2 * len(x), *x.shape[1:]))
        _check_halves(name, "raw", raw, scale, channels)
    if base is not None:
        expect_floating(name, x=x, base=base)
        expect_shape(name, "base", base, tuple(raw.shape))
    if len(velocities) != len(weights):
        raise ValueError(
            f"{name}: weights must be as many as velocities, got {len(weights)} and "
            f"{len(velocities)}"
        )
    check_velocities(name, x, velocities)


def _example_guided(make: Make) -> Iterable[tuple[Any, ...]]:
    yield make(1, 1, 8, 8), make(1, 1, 8, 8), None, 1, 0.1
    yield make(2, 4, 8, 8), make(4, 4, 8, 8), 1.5, 3, 0.05, None, [make(4, 4, 8, 8)], [0.05]
    yield make(3, 4, 5, 7), make(6, 4, 5, 7), make(3, 1, 1, 1), 4, 0.1, make(6, 4, 5, 7)
    yield (
        make(3, 4, 5, 7),
        make(3, 4, 5, 7),
        None,
        3,
        0.2,
        make(3, 4, 5, 7),
        [make(6, 4, 5, 7) for _ in range(3)],
        [-0.1, 0.03, -0.01],
    )


@op(
    check=_check_guided,
    example=_example_guided,
    schema="(Tensor x, Tensor raw, Tensor? scale, int channels, float weight, Tensor? base, "
    "Tensor[] velocities, float[] weights)"
    " -> (Tensor, Tensor)",
    lower=lambda x, raw, scale, *rest: (
        x,
        raw,
        None if scale is None else _as_tensor(raw, scale),
        *rest,
    ),
)
def guided_update(
    x: Tensor, raw: Tensor, scale: float | Tensor | None, channels: int, weight: float,
    base: Tensor | None = None, velocities: Sequence[Tensor] = (), weights: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All of a solver step that follows its network: guide the raw output, add it to a base
    velocity, write that to the cache, update x.

    x (N, C, H, W); raw (2N, C, H, W), conditional rows first, or (N, C, H, W) with scale None;
    scale, channels as in `guide`; base of raw's shape, the velocity that a refiner's offset
    corrects; velocities and weights as in `velocity_update`, none by default -> (x + the weighted
    velocities + weight * v, in x's dtype; v = guide(raw) + base, of raw's shape, in x's dtype). The
    update of x uses v as it is before rounding to x's dtype.
    """
    dtype = wide(x, raw)
    v = raw.to(dtype)
    if scale is not None:
        v = guide.reference(v, scale, channels)
    if base is not None:
        v = v + base.to(dtype)
    moved = velocity_update.reference(x.to(dtype), [*velocities, v], [*weights, weight])
    return moved.to(x.dtype), v.to(x.dtype, copy=v is raw)


def _unsupported_guided(x: Tensor, raw: Tensor, *rest: Any) -> str | None:
    return (
        too_many_velocities(x, rest[-2], rest[-1])
        or too_many_images(len(x))
        or too_large(x[:1].numel())
    )


@guided_update.backend("triton", unsupported=_unsupported_guided)
def _guided_update_triton(
    x: Tensor, raw: Tensor, scale: float | Tensor | None, channels: int, weight: float,
    base: Tensor | None, velocities: Sequence[Tensor], weights: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, raw = x.contiguous(), raw.contiguous()
    N, S, HW = len(x), x[0].numel(), x[0, 0].numel()
    tensors, numbers = pad_velocities([v[:N] for v in velocities], weights, x)
    out, velocity = torch.empty_like(x), torch.empty(raw.shape, dtype=x.dtype, device=x.device)
    scales = x if scale is None else scale_per_image(raw, scale)
    block = min(BLOCK, next_power_of_2(S))
    _guided_update_kernel.launch(
        (-(-S // block), N),
        x, raw, scales, x if base is None else base.contiguous(), *tensors, out, velocity,
        float(weight), *numbers,
        N, S, HW, channels, scale is not None, base is not None, len(velocities), block,
    )  # fmt: skip
    return out, velocity


# CUDA: csrc/velocity_update.cu


def _unsupported_guided_cuda(x: Tensor, raw: Tensor, *rest: Any) -> str | None:
    base, velocities, weights = rest[-3:]
    if reason := too_many_velocities(x, velocities, weights) or too_many_images(len(x)):
        return reason
    if x.dtype not in (torch.float32, raw.dtype):
        return f"raw is {raw.dtype} beside x of {x.dtype}"
    return _cuda.same_dtype(x, base, *velocities)


@guided_update.backend("cuda", unsupported=_unsupported_guided_cuda)
def _guided_update_cuda(
    x: Tensor, raw: Tensor, scale: float | Tensor | None, channels: int, weight: float,
    base: Tensor | None, velocities: Sequence[Tensor], weights: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, raw = x.contiguous(), raw.contiguous()
    out, velocity = torch.empty_like(x), torch.empty(raw.shape, dtype=x.dtype, device=x.device)
    scales = None if scale is None else scale_per_image(raw, scale).float()
    others = [v[: len(x)].contiguous() for v in velocities]
    base = None if base is None else base.contiguous()
    name, grid, threads, args = cuda_call(
        x, raw, scales, base, others, weights, out, velocity, weight, channels
    )
    _cuda.launch(name, grid, threads, 0, args)
    return out, velocity
