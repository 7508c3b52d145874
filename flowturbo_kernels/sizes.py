"""Arguments of the operations in the sizes of published models, which benchmarks time and tests
compile kernels for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .adaln import EPS
from .arguments import Make
from .linear_fp8 import quantize_rows
from .linear_quantized import layer


def sit(
    make: Make, batch: int, *, hidden: int = 1152, heads: int = 16, side: int = 32, patch: int = 2
) -> Iterator[tuple[str, Any]]:
    """(operation, arguments) of one guided call of a SiT on `batch` images, by default SiT-XL/2 at
    256 x 256.
    """
    N, R, T, D, C, p = batch, 2 * batch, (side // patch) ** 2, hidden, 4, patch
    latents = C, side, side
    modulations = make(R, 6 * D).chunk(6, dim=1)
    tokens, y = make(R, T, D), make(R, T, D)
    yield "adaln_modulate", (tokens, *modulations[:2])
    yield "gated_residual_adaln", (tokens, y, *modulations[2:5])
    yield "attention", (make(R, T, 3, heads, D // heads),)
    for K, M, activation in (
        (D, 3 * D, None),
        (D, D, None),
        (D, 4 * D, "gelu_tanh"),
        (4 * D, D, None),
    ):
        yield "linear", (make(R, T, K), make(M, K) / K**0.5, make(M), activation)
    yield (
        "linear_gated_residual",
        (make(R, T, 4 * D), make(D, 4 * D) / D**0.5, make(D), tokens, modulations[5]),
    )
    layers = make(D, 256) / 16, make(D), make(D, D) / D**0.5, make(D)
    yield "conditions", (make(N, D), [k / 9 for k in range(7)], *layers, make(D))
    yield "patch_embed", (make(N, *latents), make(D, C, p, p), make(D), None, make(T, D), 2)
    yield (
        "patch_embed",
        (make(N, *latents), make(D, 2 * C, p, p), make(D), make(R, *latents), make(T, D)),
    )
    x, v, raw = make(N, *latents), make(R, *latents), make(R, *latents)
    yield "velocity_update", (x, [v, raw], [0.05, 0.05])
    yield "guide", (raw, 1.5, 3)
    yield "guided_update", (x, raw, 1.5, 3, 0.05, v, [v], [0.05])
    layer = tokens, *modulations[:2], make(2 * p * p * C, D) / D**0.5, make(2 * p * p * C)
    for base in (None, v):
        step = x, 1.5, 3, 0.05, base, [v], [0.05]
        yield "final_update", (*layer, *step, EPS, y, modulations[2])


def sit_fp8(
    make: Make, batch: int, *, hidden: int = 1152, heads: int = 16, tokens: int = 256
) -> Iterator[tuple[str, Any]]:
    """(operation, arguments) of a block of a guided call of a SiT in fp8, and of the operations
    that quantise their input themselves.
    """
    R, T, D = 2 * batch, tokens, hidden
    x, y = make(R, T, D), make(R, T, D)
    shift, scale, gate = make(R, 6 * D).chunk(6, dim=1)[:3]
    static = make(1).float().abs() / 128 + 1 / 128
    yield "adaln_quantized", (x, shift, scale)
    yield "gated_residual_adaln_quantized", (x, y, gate, shift, scale)
    q, q_scale = quantize_rows.reference(x.flatten(0, 1))
    q, wide = q.view(R, T, D), make(R, T, 4 * D).to(torch.float8_e4m3fn)
    qkv, fc1, fc2 = layer(make, D, 3 * D), layer(make, D, 4 * D), layer(make, 4 * D, D)
    yield "linear_quantized", (q, q_scale, *qkv, None, None)
    yield "linear_quantized", (q, q_scale, *fc1, "gelu_tanh", static)
    yield "linear_quantized", (wide, None, *fc2, None, None)
    yield "linear_quantized_residual", (wide, None, *fc2, x, gate)
    yield "branch_end_fp8", (wide, *fc2, x, gate, shift, scale)
    packed = make(R, T, 3, heads, D // heads)
    yield "attention_quantized", (packed, static)
    plain = make(D, D) / D**0.5
    weight, weight_scale = quantize_rows.reference(plain)
    proj = weight, weight_scale * static, make(D)
    yield "attention_branch_fp8", (packed, static, *proj, plain, x, gate, shift, scale)
    for K, N, activation in ((D, 3 * D, None), (D, 4 * D, "gelu_tanh")):
        yield "linear_fp8", (x, *layer(make, K, N), activation)
    yield "quantize_rows", (x.flatten(0, 1),)
    yield "quantize_static", (make(R, T, 4 * D), static, "gelu_tanh")


def vae(make: Make, batch: int, side: int = 32) -> Iterator[tuple[str, Any]]:
    """(operation, arguments) of the SD autoencoder's decoder on latents of that side: one norm of
    each width, and what else stands between its convolutions.
    """

    def images(channels: int, scale: int) -> torch.Tensor:
        shape = batch, channels, side * scale, side * scale
        return make(*shape).to(memory_format=torch.channels_last)

    def norm(channels: int) -> tuple[Any, ...]:
        return make(channels), make(channels), 32, 1e-6

    widths = (512, 1), (512, 4), (256, 8), (128, 8)
    for C, scale in widths:
        yield "group_norm_silu", (images(C, scale), make(C), make(C), 32)
    for C, scale in widths:
        yield "shifted_group_norm", (images(C, scale), make(C), *norm(C), True)
    for C, scale in widths:
        yield (
            "residual_group_norm",
            (images(C, scale), make(C), images(C, scale), None, *norm(C), True),
        )
    yield "shifted_sum", (images(512, 2), make(512), images(512, 2), None)
    for C, scale in ((512, 1), (512, 2), (256, 4)):
        yield "double_pixels", (images(C, scale), make(C), images(C, scale), None)
        four = make(batch, 4 * C, side * scale + 1, side * scale + 1)
        four = four.to(memory_format=torch.channels_last)
        yield "interleaved_group_norm", (four, make(C), *norm(C), True)
    latents = make(batch, 4, side, side)
    yield "unscale_latents", (latents, 0.18215, 0.0, latents.dtype)
    yield "image_bytes", (images(3, 8),)
