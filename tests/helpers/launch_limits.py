"""What a launch may ask of a GPU, and the largest inputs that kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flowturbo_kernels.arguments import Make

THREADS, REGISTERS = 1024, 65536
"""Of a block: at most so many threads, and so many registers of all of them (CUDA C++ Programming
Guide, compute capabilities).
"""
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a block may have there; more than 48 KB only by an opt-in of the
kernel's, which Triton makes.
"""
PLAIN_SHARED = 48 << 10
GRID = (2**31 - 1, 65535, 65535)


def registers(each: int, threads: int) -> int:
    """What a block takes of a multiprocessor's: whole warps, 256 registers at a time."""
    return -(-each * 32 // 256) * 256 * -(-threads // 32)


def largest(make: Make) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(operation, arguments) at the limits that kernels state, where a program holds most: what
    lies beyond `unsupported` refuses.
    """
    for D in (2, 16384):
        rows = make(1, 2, D)
        yield "adaln_modulate", (rows, make(1, D), make(1, D))
        residual = rows, make(1, 2, D), make(1, D), make(1, D), make(1, D)
        yield "gated_residual_adaln", residual
        yield "adaln_quantized", (rows, make(1, D), make(1, D))
        yield "gated_residual_adaln_quantized", residual
    for head_dim in (8, 128):
        qkv = make(1, 300, 3, 2, head_dim)
        yield "attention", (qkv,)
        yield "attention_quantized", (qkv, make(1).float())
    for channels, groups in ((4096, 1), (4096, 4096), (2049, 683)):
        x = make(1, channels, 128, 128).to(memory_format=torch.channels_last)
        yield "group_norm_silu", (x, make(channels), make(channels), groups)
        vectors = (make(channels) for _ in range(3))
        yield "residual_group_norm", (x, next(vectors), x, None, *vectors, groups)
    for C, p in ((16, 4), (256, 1)):
        x, v = make(1, C, 2 * p, 2 * p), [make(2, C, 2 * p, 2 * p)] * 4
        yield "patch_embed", (x, make(96, 2 * C, p, p), make(96), v[0])
        layer = (
            make(2, 4, 1152),
            make(2, 1152),
            make(2, 1152),
            make(2 * p * p * C, 1152),
            make(2 * p * p * C),
        )
        yield "final_update", (*layer, x, 1.5, C, 0.1, v[0], v, [0.1] * 4)
    yield "quantize_rows", (make(2, 16384),)
