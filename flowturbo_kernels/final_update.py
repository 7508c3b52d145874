"""The final layer of a DiT and all of the solver step that follows, in one kernel: projection,
unpatchify, guidance, velocity cache and the update of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import op
from ._triton import (
    dot_precision,
    in_turn,
    kernel,
    next_power_of_2,
    rows,
    tl,
    too_large,
    too_many_images,
)
from .adaln import EPS, adaln_modulate
from .arguments import (
    Make,
    expect_floating,
    expect_modulation,
    expect_one_dtype,
    expect_shape,
    modulation_rows,
    wide,
)
from .guidance import check_guided, guided_update, scale_per_image
from .velocity_update import add_velocities, pad_velocities, too_many_velocities

# Triton: one program per block of tokens of one image, for both guidance halves, so that guidance
# stays inside a program. Tokens are read twice (statistics, projection), the second time from the
# cache: 16 rows of 1152 are 37 KB in 16 bits, and as much again of the branch that is added.


@kernel
def _tokens(x, y, gate, token, token_t, y_t, T, k, D: tl.constexpr, HAS_Y: tl.constexpr):
    """A piece of a block of tokens, plus the gated branch: (BLOCK_T, BLOCK_K) in float32."""
    inside = (token < T)[:, None] & (k < D)[None, :]
    h = tl.load(x + token[:, None] * token_t + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        branch = tl.load(y + token[:, None] * y_t + k[None, :], mask=inside, other=0.0)
        g = tl.load(gate + k, mask=k < D, other=0.0).to(tl.float32)
        h += g[None, :] * branch.to(tl.float32)
    return h


@kernel
def _project(
    x, y, gate, shift, scale, weight, bias, token_t, y_t, token, T, o, eps, D: tl.constexpr,
    C: tl.constexpr, CO: tl.constexpr, P: tl.constexpr, HAS_Y: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm, modulation and projection of one half's block of tokens: (BLOCK_T, BLOCK_O) in
    float32.
    """
    mean = tl.zeros((BLOCK_T,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):  # mean and deviation of a piece join those before it
        k = start + tl.arange(0, BLOCK_K)
        h = _tokens(x, y, gate, token, token_t, y_t, T, k, D, HAS_Y)
        count = tl.minimum(D - start, BLOCK_K).to(tl.float32)
        part = tl.sum(h, axis=1) / count
        h = tl.where((k < D)[None, :], h - part[:, None], 0.0)
        delta = part - mean
        squares += tl.sum(h * h, axis=1) + delta * delta * (start * count / (start + count))
        mean += delta * (count / (start + count))
    rstd = 1.0 / tl.sqrt(squares / D + eps)
    row = (o // C) * CO + o % C  # without the rows of the learned sigma
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = _tokens(x, y, gate, token, token_t, y_t, T, k, D, HAS_Y) - mean[:, None]
        gain = 1.0 + tl.load(scale + k, mask=k < D, other=0.0).to(tl.float32)
        offset = tl.load(shift + k, mask=k < D, other=0.0).to(tl.float32)
        h = h * rstd[:, None] * gain[None, :] + offset[None, :]
        w = tl.load(
            weight + row[None, :] * D + k[:, None],
            mask=(o < P * P * C)[None, :] & (k < D)[:, None],
            other=0.0,
        )
        total = tl.dot(h.to(w.dtype), w, total, input_precision=PRECISION)
    return total + tl.load(bias + row, mask=o < P * P * C, other=0.0).to(tl.float32)[None, :]


@kernel
def _final_kernel(
    tokens, branch, gate, shift, scale, weight, bias, x, guidance, base, v0, v1, v2, v3, out,
    velocity, weight_v, w0, w1, w2, w3, sign,
    N, M, T, columns, channels, eps, token_b, token_t, branch_b, branch_t, gate_b, shift_b, scale_b,
    D: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, P: tl.constexpr, GUIDED: tl.constexpr,
    BASE: tl.constexpr, BRANCH: tl.constexpr,
    COUNT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.arange(0, BLOCK_O)
    row = tl.minimum(n, M - 1)
    c = sign * _project(
        tokens + n * token_b, branch + n * branch_b, gate + row * gate_b, shift + row * shift_b,
        scale + row * scale_b, weight, bias, token_t, branch_t, token, T, o, eps,
        D, C, CO, P, BRANCH, PRECISION, BLOCK_T, BLOCK_O, BLOCK_K,
    )  # fmt: skip
    HW = T * P * P
    pixel, channel = o // C, o % C
    y = (token // columns)[:, None] * P + (pixel // P)[None, :]
    z = (token % columns)[:, None] * P + (pixel % P)[None, :]
    at = (n * C + channel[None, :]) * HW + y * columns * P + z
    inside = (token < T)[:, None] & (o < P * P * C)[None, :]
    if GUIDED:
        m = n + N
        row = tl.minimum(m, M - 1)
        u = sign * _project(
            tokens + m * token_b, branch + m * branch_b, gate + row * gate_b, shift + row * shift_b,
            scale + row * scale_b, weight, bias, token_t, branch_t, token, T, o, eps,
            D, C, CO, P, BRANCH, PRECISION, BLOCK_T, BLOCK_O, BLOCK_K,
        )  # fmt: skip
        guided = u + tl.load(guidance + n).to(tl.float32) * (c - u)
        both = (channel < channels)[None, :]
        c, u = tl.where(both, guided, c), tl.where(both, guided, u)
        at_u = (m * C + channel[None, :]) * HW + y * columns * P + z
        if BASE:
            u += tl.load(base + at_u, mask=inside, other=0.0).to(tl.float32)
        tl.store(velocity + at_u, u, mask=inside)
    if BASE:
        c += tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(velocity + at, c, mask=inside)
    total = add_velocities(x, v0, v1, v2, v3, w0, w1, w2, w3, at, inside, COUNT)
    tl.store(out + at, total + weight_v * c, mask=inside)


def _check(
    tokens: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, x: Tensor,
    guidance: float | Tensor | None, channels: int, weight_v: float, base: Tensor | None = None,
    velocities: Sequence[Tensor] = (), weights: Sequence[float] = (), eps: float = EPS,
    branch: Tensor | None = None, gate: Tensor | None = None, sign: float = 1.0,
) -> None:  # fmt: skip
    name = "final_update"
    expect_floating(name, tokens=tokens, shift=shift, scale=scale, weight=weight, bias=bias, x=x)
    expect_one_dtype(name, tokens=tokens, weight=weight, bias=bias)
    expect_shape(name, "x", x, (None, None, None, None))
    N, C, H, W = x.shape
    expect_shape(name, "tokens", tokens, (N if guidance is None else 2 * N, None, None))
    R, _, D = tokens.shape
    expect_modulation(name, "shift", shift, R, D)
    expect_shape(name, "scale", scale, tuple(shift.shape))
    if (branch is None) != (gate is None):
        raise ValueError(f"{name}: branch and gate must be given together")
    if branch is not None and gate is not None:
        expect_floating(name, tokens=tokens, branch=branch, gate=gate)
        expect_shape(name, "branch", branch, tuple(tokens.shape))
        expect_shape(name, "gate", gate, tuple(shift.shape))
    expect_shape(name, "weight", weight, (None, D))
    expect_shape(name, "bias", bias, (weight.shape[0],))
    _patch(tokens, weight, x)
    # stands for the network's output: its shape, device and dtype
    raw = x[:1, :1, :1, :1].expand(R, C, H, W)
    check_guided(name, x, raw, guidance, channels, base, velocities, weights)


def _patch(tokens: Tensor, weight: Tensor, x: Tensor) -> tuple[int, int]:
    """(patch size p, output channels: C, or 2C with a learned sigma), from the number of tokens and
    the rows of the weight.
    """
    T, (_, C, H, W) = tokens.shape[1], x.shape
    p = math.isqrt(H * W // T) if T else 0
    if not p or p * p * T != H * W or H % p or W % p:
        raise ValueError(
            f"final_update: tokens must be as many as square patches fill x {tuple(x.shape)}, got "
            f"{T}"
        )
    if weight.shape[0] not in (p * p * C, 2 * p * p * C):
        raise ValueError(
            f"final_update: weight must have {p * p * C} or {2 * p * p * C} rows, got "
            f"{weight.shape[0]}"
        )
    return p, weight.shape[0] // (p * p)


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for N, C, side, p, D, sigma, halves in (
        (1, 1, 4, 1, 8, 1, 1),
        (2, 4, 8, 2, 72, 2, 2),
        (3, 3, 10, 2, 96, 1, 2),
        (1, 4, 16, 4, 144, 2, 1),
    ):
        R, T = halves * N, (side // p) ** 2
        outputs = sigma * p * p * C
        latents = (N, C, side, side)
        layer = (
            make(R, T, D),
            make(R, D),
            make(R, D),
            make(outputs, D) / D**0.5,
            make(outputs),
            make(*latents),
        )
        guidance = None if halves == 1 else 1.5 if sigma == 2 else make(N, 1, 1, 1)
        yield *layer, guidance, min(C, 3), 0.1
        yield (
            *layer,
            guidance,
            C,
            0.05,
            make(R, *latents[1:]),
            [make(R, *latents[1:]), make(*latents)],
            [0.05, -0.02],
        )
        M = N + 1 if halves == 2 else N
        layer = make(R, T, D), make(M, D), make(M, D), *layer[3:]
        branch = make(R, T, D), make(M, D)
        yield *layer, guidance, C, 0.05, None, [make(*latents)], [0.05], EPS, *branch, -1.0


@op(
    check=_check,
    example=_example,
    schema="(Tensor tokens, Tensor shift, Tensor scale, Tensor weight, Tensor bias, Tensor x, "
    "Tensor? guidance, int channels, float weight_v, Tensor? base, Tensor[] velocities, "
    "float[] weights, float eps, Tensor? branch, Tensor? gate, float sign) -> (Tensor, Tensor)",
    lower=lambda tokens, shift, scale, weight, bias, x, guidance, *rest: (
        *(tokens, shift, scale, weight, bias, x),
        None if guidance is None else scale_per_image(tokens, guidance).view(-1, 1, 1, 1),
        *rest,
    ),
)
def final_update(
    tokens: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, x: Tensor,
    guidance: float | Tensor | None, channels: int, weight_v: float, base: Tensor | None = None,
    velocities: Sequence[Tensor] = (), weights: Sequence[float] = (), eps: float = EPS,
    branch: Tensor | None = None, gate: Tensor | None = None, sign: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The final layer of a DiT, then guided_update, with nothing between them written to memory.

    tokens (R, T, D), of the trunk; shift, scale (R, D), or (N + 1, D) as in `adaln_modulate`;
    weight (p * p * C, D), channels innermost, or twice the rows, of which a learned sigma's are not
    read; bias; x (N, C, H, W), H * W = p * p * T, R = 2N with guidance, conditional rows first, or
    N with None; the rest as in `guided_update`; branch (R, T, D) and gate, of shift's shape: the
    last residual of the trunk, gate * branch, which is added to the tokens; sign: -1 for a network
    of the opposite velocity -> (the updated x, (N, C, H, W); v, (R, C, H, W)), both in x's dtype.
    The projection's input is rounded to the tokens' dtype; the sum with the branch and the output
    are not rounded.
    """
    dtype = wide(tokens)
    p, outputs = _patch(tokens, weight, x)
    (R, _, D), (_, C, H, W) = tokens.shape, x.shape
    total = tokens.to(dtype)
    if branch is not None and gate is not None:
        total = total + modulation_rows(gate, R).to(dtype)[:, None] * branch.to(dtype)
    h = adaln_modulate.reference(total, shift, scale, eps).to(tokens.dtype).to(dtype)
    weight = weight.view(p * p, outputs, D)[:, :C].reshape(-1, D)
    bias = bias.view(p * p, outputs)[:, :C].reshape(-1)
    y = sign * F.linear(h, weight.to(dtype), bias.to(dtype))
    raw = y.view(R, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(R, C, H, W)
    moved, v = guided_update.reference(
        x.to(wide(x)), raw, guidance, channels, weight_v, base, velocities, weights
    )
    return moved.to(x.dtype), v.to(x.dtype)


def _unsupported(
    tokens: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *rest: Any,
) -> str | None:
    if not tokens.dtype == weight.dtype == bias.dtype:
        return "tensors are of several dtypes, under autocast"
    velocities, weights, _, branch = rest[4:8]
    strides = [t.stride(1) for t in (tokens, branch) if t is not None]
    numbers = max(tokens.shape[1] * max(strides), x[:1].numel())
    reason = too_many_velocities(x, velocities, weights)
    reason = reason or too_many_images(len(x)) or too_large(numbers)
    if reason:
        return reason
    p, _ = _patch(tokens, weight, x)
    outputs = p * p * x.shape[1]
    return None if outputs <= 256 else f"at most 256 outputs a token, got {outputs}"


@final_update.backend("triton", unsupported=_unsupported)
def _final_triton(
    tokens: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, x: Tensor,
    guidance: float | Tensor | None, channels: int, weight_v: float, base: Tensor | None,
    velocities: Sequence[Tensor], weights: Sequence[float], eps: float, branch: Tensor | None,
    gate: Tensor | None, sign: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p, outputs = _patch(tokens, weight, x)
    (R, T, D), (N, C, _, W) = tokens.shape, x.shape
    tokens, shift, scale, x = rows(tokens), rows(shift), rows(scale), x.contiguous()
    y, g = (tokens if branch is None else rows(branch)), (shift if gate is None else rows(gate))
    tensors, numbers = pad_velocities([v[:N] for v in velocities], weights, x)
    out = torch.empty_like(x)
    velocity = torch.empty(R, *x.shape[1:], dtype=x.dtype, device=x.device)
    block_o = max(16, next_power_of_2(p * p * C))
    block_t, block_k = 16, 128 if block_o <= 64 else 64
    if tokens.dtype == torch.float32:
        block_k //= 4  # more would spill, outside the tensor cores
    _final_kernel.launch(
        (-(-T // block_t), N),
        tokens, y, g, shift, scale, weight.contiguous(), bias.contiguous(), x,
        x if guidance is None else scale_per_image(tokens, guidance),
        x if base is None else base.contiguous(), *tensors, out, velocity,
        float(weight_v), *numbers, float(sign), N, len(shift), T, W // p, channels, eps,
        *tokens.stride()[:2], *y.stride()[:2], g.stride(0), shift.stride(0), scale.stride(0),
        D, C, outputs, p, guidance is not None, base is not None, branch is not None,
        len(velocities),
        dot_precision(tokens), block_t, block_o, block_k,
        num_warps=4,
    )  # fmt: skip
    return out, velocity
