"""The operations in plain torch, as the public code of these models has them, in the dtype of their
arguments: what "eager" and "compiled" run.

An operation's reference is no rival: it widens to float32 on purpose, with twice the launches and
bytes in bfloat16. Where torch has one function for two steps (addcmul, lerp, add with alpha) it is
taken, so that no gain is one over careless code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rowwise import LARGEST
from torch import Tensor

from flowturbo_kernels.conditions import MAX_PERIOD

EPS = 1e-6
_TINY = 1e-12


def _each_row(modulation: Tensor, rows: int) -> Tensor:
    """Of (N + 1, D) the last is the row of a whole half of guidance."""
    if len(modulation) == rows:
        return modulation
    return torch.cat([modulation, modulation[-1:].expand(rows - len(modulation), -1)])


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    shift, scale = _each_row(shift, len(x)), _each_row(scale, len(x))
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale[:, None])


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    x = torch.addcmul(x, _each_row(gate, len(x))[:, None], y)
    return x, adaln_modulate(x, shift, scale, eps)


def attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
    return _activated(F.linear(x, weight, bias), activation)


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y


def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor
) -> Tensor:
    return torch.addcmul(residual, gate[:, None], F.linear(x, weight, bias))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=_TINY)
    return (x / scale).to(torch.float8_e4m3fn), scale[:, 0]


def linear_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, activation: str | None = None
) -> Tensor:
    q, scale = quantize_rows(x.flatten(0, -2))
    y = torch._scaled_mm(
        q,
        weight.t(),
        scale[:, None],
        weight_scale[None],
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return _activated(y, activation).unflatten(0, x.shape[:-1])


def conditions(
    embedded: Tensor,
    times: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    null: Tensor | None = None,
) -> Tensor:
    half, device = weight1.shape[1] // 2, embedded.device
    rates = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=device))
    angles = torch.tensor(times, device=device)[:, None] * rates
    features = torch.cat([angles.cos(), angles.sin()], dim=1).to(weight1.dtype)
    time = F.linear(F.silu(F.linear(features, weight1, bias1)), weight2, bias2)
    labels = embedded if null is None else torch.cat([embedded, null[None]])
    return F.silu(time[:, None] + labels)


def quantize_static(x: Tensor, scale: Tensor, activation: str | None = None) -> Tensor:
    y = _activated(x, activation) / scale
    return y.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def adaln_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    q, q_scale = quantize_rows(adaln_modulate(x, shift, scale, eps).flatten(0, 1))
    return q.view(x.shape), q_scale


def gated_residual_adaln_quantized(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.addcmul(x, _each_row(gate, len(x))[:, None], y)
    return x, *adaln_quantized(x, shift, scale, eps)


def attention_quantized(qkv: Tensor, out_scale: Tensor) -> Tensor:
    return quantize_static(attention(qkv), out_scale)


def linear_quantized(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: str | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    flat = x.flatten(0, -2)
    ones = torch.ones(len(flat), device=x.device) if x_scale is None else x_scale
    y = torch._scaled_mm(
        flat, weight.t(), ones[:, None], weight_scale[None], bias=bias, out_dtype=bias.dtype,
        use_fast_accum=True
    ).unflatten(0, x.shape[:-1])  # fmt: skip
    return (
        _activated(y, activation)
        if out_scale is None
        else quantize_static(y, out_scale, activation)
    )


def linear_quantized_residual(*args: Any) -> Tensor:
    *product, residual, gate = args
    return torch.addcmul(residual, gate[:, None], linear_quantized(*product))


def branch_end_fp8(
    y: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    branch = linear_quantized(y, None, weight, weight_scale, bias)
    return gated_residual_adaln_quantized(x, branch, *rest)


def attention_branch_fp8(
    qkv: Tensor, out_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    plain: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = attention_quantized(qkv, out_scale)
    return branch_end_fp8(y, weight, weight_scale, bias, *rest)


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None = None,
    positions: Tensor | None = None,
    copies: int = 1,
    ahead: Tensor | None = None,
    step: float = 0.0,
) -> Tensor:
    if ahead is not None:
        x = torch.add(x, ahead[: len(x)], alpha=step)
    if v is not None:
        x = torch.cat([x.repeat(len(v) // len(x), 1, 1, 1), v], dim=1)
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)
    tokens = tokens if positions is None else tokens + positions
    return tokens if copies == 1 else tokens.repeat(copies, 1, 1)


def velocity_update(x: Tensor, velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    for v, weight in zip(velocities, weights, strict=True):
        x = torch.add(x, v[: len(x)], alpha=weight)
    return x


def guide(v: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    c, u = v[:, :channels].chunk(2)
    guided = torch.lerp(u, c, scale)
    return torch.cat([torch.cat([guided, guided]), v[:, channels:]], dim=1)


def guided_update(
    x: Tensor,
    raw: Tensor,
    scale: float | Tensor | None,
    channels: int,
    weight: float,
    base: Tensor | None = None,
    velocities: Sequence[Tensor] = (),
    weights: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    v = raw if scale is None else guide(raw, scale, channels)
    v = v if base is None else v + base
    return velocity_update(x, [*velocities, v], [*weights, weight]), v


def final_update(
    tokens: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    guidance: float | Tensor | None,
    channels: int,
    weight_v: float,
    base: Tensor | None = None,
    velocities: Sequence[Tensor] = (),
    weights: Sequence[float] = (),
    eps: float = EPS,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    sign: float = 1.0,
) -> tuple[Tensor, Tensor]:
    (_, C, H, W), (R, T, _) = x.shape, tokens.shape
    p = round((H * W // T) ** 0.5)
    if branch is not None and gate is not None:
        tokens = torch.addcmul(tokens, _each_row(gate, R)[:, None], branch)
    y = F.linear(adaln_modulate(tokens, shift, scale), weight, bias)
    raw = y.view(R, H // p, W // p, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(R, -1, H, W)
    raw = raw[:, :C] if sign == 1 else sign * raw[:, :C]
    return guided_update(x, raw, guidance, channels, weight_v, base, velocities, weights)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = EPS
) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def shifted_group_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = EPS,
    silu: bool = True,
) -> Tensor:
    x = x if shift is None else x + shift[:, None, None]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def shifted_sum(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> Tensor:
    y = y + shift[:, None, None]
    if residual_shift is not None:
        residual = residual + residual_shift[:, None, None]
    return y if residual is None else residual + y


def residual_group_norm(
    y: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_shift: Tensor | None,
    *norm: Any,
) -> tuple[Tensor, Tensor]:
    h = shifted_sum(y, shift, residual, residual_shift)
    return h, shifted_group_norm(h, None, *norm)


def double_pixels(y: Tensor, shift: Tensor | None = None, *residual: Any) -> Tensor:
    x = y if shift is None else shifted_sum(y, shift, *residual)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def interleaved_group_norm(y: Tensor, shift: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    parts = y.unflatten(1, (4, -1))
    views = [
        parts[:, 2 * i + j, :, i : y.shape[2] - 1 + i, j : y.shape[3] - 1 + j]
        for i in range(2)
        for j in range(2)
    ]
    h = F.pixel_shuffle(torch.stack(views, dim=2).flatten(1, 2), 2)
    h = h.contiguous(memory_format=torch.channels_last) + shift[:, None, None]
    return h, shifted_group_norm(h, None, *norm)


def unscale_latents(x: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    y = x.float() / scale + shift
    return y.to(dtype, memory_format=torch.channels_last)


def image_bytes(x: Tensor) -> Tensor:
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


PLAIN: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        adaln_modulate,
        gated_residual_adaln,
        attention,
        linear,
        linear_gated_residual,
        quantize_rows,
        quantize_static,
        linear_fp8,
        conditions,
        adaln_quantized,
        gated_residual_adaln_quantized,
        attention_quantized,
        linear_quantized,
        linear_quantized_residual,
        branch_end_fp8,
        attention_branch_fp8,
        patch_embed,
        velocity_update,
        guide,
        guided_update,
        final_update,
        group_norm_silu,
        shifted_group_norm,
        shifted_sum,
        residual_group_norm,
        double_pixels,
        interleaved_group_norm,
        unscale_latents,
        image_bytes,
    )
}
"""By the operations' names."""
