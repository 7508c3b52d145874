"""Self-attention with its result in fp8 (e4m3), for a product in fp8 after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _e4m3
from ._op import op, requested_backend
from ._tune import Candidates, form
from .arguments import Make, expect_floating
from .attention import EXACT_TILES, TILES, _check, _example, _unsupported, attention, run_tile
from .linear_fp8 import quantize_static


def _check_attention(qkv: Tensor, out_scale: Tensor) -> None:
    _check(qkv)
    expect_floating("attention_quantized", qkv=qkv, out_scale=out_scale)
    _e4m3.expect_scale("attention_quantized", "out_scale", out_scale, 1)


def _example_attention(make: Make) -> Iterable[tuple[Any, ...]]:
    for (qkv,) in _example(make):
        yield qkv, make(1).float().abs() / 256 + 1 / 256


@op(
    check=_check_attention,
    example=_example_attention,
    schema="(Tensor qkv, Tensor out_scale) -> Tensor",
)
def attention_quantized(qkv: Tensor, out_scale: Tensor) -> Tensor:
    """`attention` with a result in fp8: divided by out_scale (1,) float32, saturated at 448.

    qkv (B, T, 3, heads, head_dim) -> (B, T, heads * head_dim) float8_e4m3fn.
    """
    return quantize_static.reference(attention.reference(qkv), out_scale)


def _unsupported_attention(qkv: Tensor, *_: Any) -> str | None:
    return _unsupported(qkv) or _e4m3.no_e4m3(qkv[..., :1])


def _attention_candidates(qkv: Tensor, out_scale: Tensor) -> Candidates:
    """Our tiles and, under "auto", whatever is the fastest attention, quantised apart."""
    tiles = EXACT_TILES if qkv.dtype == torch.float32 else TILES
    functions: dict[str, Callable[..., Tensor]] = {
        f"triton {tile}": partial(run_tile, qkv, tile, out_scale) for tile in tiles
    }
    if requested_backend() == "auto":
        functions["attention, quantised apart"] = lambda: quantize_static(attention(qkv), out_scale)
    return Candidates(("attention_quantized", form(qkv)), functions, qkv.device)


@attention_quantized.backend(
    "triton", unsupported=_unsupported_attention, candidates=_attention_candidates
)
def _attention_triton(qkv: Tensor, out_scale: Tensor) -> Tensor:
    y: Tensor = _attention_candidates(qkv, out_scale).run()
    return y
