"""What adaLN's modulations are computed from: embedded times plus embedded labels, through SiLU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import op
from ._triton import MAX_IMAGES, in_turn, kernel, next_power_of_2, rows, tl, too_large
from .arguments import Make, expect_floating, expect_one_dtype, expect_shape, wide

MAX_PERIOD = 10_000
"""The longest period of the sinusoidal features of a time, over 2 pi."""
_TIMES = 8
"""Times of one launch: arguments of the kernel, since a copy from the host can't be captured."""

# Triton: one program per time and block of features. The first product is so small that its input,
# the features of a time, is computed by each program; the second reads its output.


@kernel
def _cos_sin(angle):
    """Of angles up to some thousands, by the Cephes library's polynomials: tl.cos and tl.sin keep a
    table for the largest angles in local memory.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - quarters * 1.5703125) - quarters * 4.837512969970703e-4) - (
        quarters * 7.54978995489188e-8
    )
    z = r * r
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z
    cosine = cosine - 0.5 * z + 1.0
    turn = quarters - 4.0 * tl.floor(quarters * 0.25)
    odd = (turn == 1.0) | (turn == 3.0)
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((turn == 1.0) | (turn == 2.0), -c, c), tl.where(turn >= 2.0, -s, s)


@kernel
def _hidden_kernel(
    weight, bias, out, t0, t1, t2, t3, t4, t5, t6, t7, D, rate, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    s = tl.program_id(1)
    t = tl.where(s == 1, t1, t0)
    t = tl.where(s == 2, t2, tl.where(s == 3, t3, t))
    t = tl.where(s == 4, t4, tl.where(s == 5, t5, t))
    t = tl.where(s == 6, t6, tl.where(s == 7, t7, t))
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    inside = (d < D)[:, None] & (k < HALF)[None, :]
    cosines, sines = _cos_sin(t * tl.exp(rate * k.to(tl.float32)))
    at = weight + d[:, None] * (2 * HALF) + k[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32) * cosines[None, :]
    y += tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32) * sines[None, :]
    h = tl.sum(y, axis=1) + tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + s * D + d, h / (1.0 + tl.exp(-h)), mask=d < D)


@kernel
def _conditions_kernel(
    hidden, weight, bias, embedded, null, out, N, D, embedded_n, NULL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    s = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_D, BLOCK_K), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(hidden + s * D + k, mask=k < D, other=0.0).to(tl.float32)
        inside = (d < D)[:, None] & (k < D)[None, :]
        w = tl.load(weight + d[:, None] * D + k[None, :], mask=inside, other=0.0)
        y += w.to(tl.float32) * h[None, :]
    time = tl.sum(y, axis=1) + tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    first = out + s * (N + NULL) * D
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None] & (d < D)[None, :]
        e = tl.load(embedded + n[:, None] * embedded_n + d[None, :], mask=inside, other=0.0)
        c = time[None, :] + e.to(tl.float32)
        tl.store(first + n[:, None] * D + d[None, :], c / (1.0 + tl.exp(-c)), mask=inside)
    if NULL:
        c = time + tl.load(null + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(first + tl.cast(N, tl.int64) * D + d, c / (1.0 + tl.exp(-c)), mask=d < D)


def _check(
    embedded: Tensor,
    times: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    null: Tensor | None = None,
) -> None:
    layers = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    expect_floating("conditions", embedded=embedded, **layers)
    expect_one_dtype("conditions", embedded=embedded, **layers)
    expect_shape("conditions", "embedded", embedded, (None, None))
    D = embedded.shape[1]
    expect_shape("conditions", "weight1", weight1, (D, None))
    if not weight1.shape[1] or weight1.shape[1] % 2:
        raise ValueError(
            f"conditions: weight1 must take an even number of features, got {tuple(weight1.shape)}"
        )
    expect_shape("conditions", "bias1", bias1, (D,))
    expect_shape("conditions", "weight2", weight2, (D, D))
    expect_shape("conditions", "bias2", bias2, (D,))
    if null is not None:
        expect_floating("conditions", embedded=embedded, null=null)
        expect_one_dtype("conditions", embedded=embedded, null=null)
        expect_shape("conditions", "null", null, (D,))
    if not times:
        raise ValueError("conditions: times must be at least one, got none")


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for N, S, D, features in ((1, 1, 8, 2), (3, 3, 72, 24), (20, 9, 96, 256)):
        layers = make(D, features) / features**0.5, make(D), make(D, D) / D**0.5, make(D)
        yield make(N, D), [s / S for s in range(S)], *layers
        yield make(N, D), [0.4 - 2.7 * s for s in range(S)], *layers, make(D)


@op(
    check=_check,
    example=_example,
    schema="(Tensor embedded, float[] times, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, Tensor? null) -> Tensor",
)
def conditions(
    embedded: Tensor,
    times: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    null: Tensor | None = None,
) -> Tensor:
    """The conditioning vectors of every time with every label, after the SiLU of adaLN.

    embedded (N, D), the labels'; times: S numbers; weight1 (D, F), F even, bias1 (D,), weight2 (D,
    D), bias2 (D,): a perceptron with SiLU of a time's F sinusoidal features, cosines first; null
    (D,), the embedded null class -> (S, N, D), or (S, N + 1, D) with null, which comes last, in
    embedded's dtype.
    """
    half, dtype = weight1.shape[1] // 2, wide(embedded)
    # Filled on the device: a copy from the host can't be captured.
    t = torch.cat([torch.full((1,), t, dtype=dtype, device=embedded.device) for t in times])
    steps = torch.arange(half, dtype=dtype, device=embedded.device) / half
    angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    features = torch.cat([angles.cos(), angles.sin()], dim=1).to(weight1.dtype)
    time = F.linear(F.silu(F.linear(features, weight1, bias1)), weight2, bias2)
    labels = embedded if null is None else torch.cat([embedded, null[None]])
    return F.silu(time[:, None] + labels)


def _unsupported(
    embedded: Tensor,
    times: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    null: Tensor | None,
) -> str | None:
    if any(t is not None and t.dtype != embedded.dtype for t in (weight1, bias1, weight2, bias2)):
        return "tensors are of several dtypes, under autocast"
    if weight1.shape[1] > 1024:
        return f"at most 1024 features of a time, got {weight1.shape[1]}"
    if len(times) > MAX_IMAGES:
        return f"at most {MAX_IMAGES} times, got {len(times)}"
    return too_large(max(weight1.numel(), weight2.numel()))


@conditions.backend("triton", unsupported=_unsupported)
def _conditions_triton(
    embedded: Tensor,
    times: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    null: Tensor | None,
) -> Tensor:
    (N, D), S, half = embedded.shape, len(times), weight1.shape[1] // 2
    embedded = rows(embedded)
    hidden = torch.empty(S, D, dtype=embedded.dtype, device=embedded.device)
    out = torch.empty(S, N + (null is not None), D, dtype=embedded.dtype, device=embedded.device)
    block_k = next_power_of_2(half)
    block_d = max(1, min(32, 4096 // block_k))
    for start in range(0, S, _TIMES):
        some = [float(t) for t in times[start : start + _TIMES]]
        _hidden_kernel.launch(
            (-(-D // block_d), len(some)),
            weight1.contiguous(), bias1.contiguous(), hidden[start:],
            *some, *[0.0] * (_TIMES - len(some)), D, -math.log(MAX_PERIOD) / half, half, block_d,
            block_k, num_warps=4,
        )  # fmt: skip
    _conditions_kernel.launch(
        (-(-D // 16), S),
        hidden, weight2.contiguous(), bias2.contiguous(), embedded,
        bias2 if null is None else null.contiguous(), out, N, D, embedded.stride(0),
        null is not None, 16, 256, 16, num_warps=4,
    )  # fmt: skip
    return out
