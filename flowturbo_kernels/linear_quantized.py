"""Products in fp8 (e4m3) of inputs that are quantised already, where their values are made: row by
row by adaLN, or with a static scale by GELU or attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _quack
from ._e4m3 import (
    expect_e4m3,
    expect_layer,
    expect_scale,
    in_e4m3,
    no_e4m3,
    ones,
)
from ._matmul import FP8_SMALL_TILES, FP8_TILES, MASKED_TILES, SPLITS, Tile, product
from ._op import op, requested_backend
from ._triton import rows
from ._tune import Candidates, form
from .arguments import Make, expect_activation, expect_floating, expect_shape, wide
from .batch_invariant import gelu_tanh
from .linear import Activation
from .linear_fp8 import quantize_rows, quantize_static

Functions = dict[str, Callable[..., Tensor]]
"""Candidates by name: functions of weight, weight_scale and bias."""


def _check(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: Activation | None = None,
    out_scale: Tensor | None = None,
) -> None:
    name = "linear_quantized"
    optional = {"x_scale": x_scale, "out_scale": out_scale}
    given = {argument: t for argument, t in optional.items() if t is not None}
    expect_floating(name, x=x, weight=weight, weight_scale=weight_scale, bias=bias, **given)
    if x.ndim < 1:
        raise ValueError(f"{name}: x must have at least one dimension, got a scalar")
    expect_e4m3(name, x=x)
    expect_layer(name, x.shape[-1], weight, weight_scale, bias)
    if x_scale is not None:
        expect_scale(name, "x_scale", x_scale, math.prod(x.shape[:-1]))
    if out_scale is not None:
        expect_scale(name, "out_scale", out_scale, 1)
    expect_activation(name, activation)


def layer(make: Make, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, weight_scale, bias) of a layer K -> N for examples."""
    return *quantize_rows.reference(make(N, K) / K**0.5), make(N)


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for M, K, N in ((1, 32, 16), (7, 96, 224), (40, 1152, 96)):
        out_scale = make(1).float().abs() / 64 + 1 / 64
        for activation in (None, "gelu_tanh"):
            x, x_scale = quantize_rows.reference(make(M, K))
            yield x, x_scale, *layer(make, K, N), activation, None
            yield x, None, *layer(make, K, N), activation, out_scale


@op(
    check=_check,
    example=_example,
    schema=(
        "(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale, Tensor bias, str? "
        "activation, Tensor? out_scale) -> Tensor"
    ),
)
def linear_quantized(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: Activation | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`linear` of an input and a weight that are quantised already.

    x (..., K) float8_e4m3fn, with the scales of its rows, x_scale (M,) float32, from
    `adaln_quantized` or `quantize_rows`; or None, where x has one scale, from `quantize_static` or
    `attention_quantized`, and weight_scale is already multiplied by it. weight (N, K)
    float8_e4m3fn; weight_scale (N,) float32; bias (N,) -> activation(product + bias), (..., N) in
    bias's dtype.
    out_scale (1,) float32: the result is divided by it, saturated at 448, and in float8_e4m3fn.
    Sums in float32.
    """
    y = _product(x, x_scale, weight, weight_scale, bias)
    y = gelu_tanh(y) if activation == "gelu_tanh" else y
    return y.to(bias.dtype) if out_scale is None else in_e4m3(y, out_scale)


def _product(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """The product and bias of the references, in the dtype in which they compute."""
    dtype = wide(bias)
    y = x.to(dtype) @ weight.to(dtype).t()
    if x_scale is not None:
        y = y * x_scale.to(dtype).view(*x.shape[:-1], 1)
    return y * weight_scale.to(dtype) + bias.to(dtype)


def _unsupported(x: Tensor, *_: Any) -> str | None:
    return no_e4m3(x)


def _tiles(flat: Tensor, x_scale: Tensor | None, N: int, **epilogue: Any) -> Functions:
    """Our kernel's tiles and, where they leave most of a GPU idle, splits of K."""
    residual = epilogue.get("residual")
    tiles: tuple[Tile, ...] = FP8_TILES
    if flat.shape[1] % 64:
        tiles = MASKED_TILES
    elif residual is not None and residual.dtype == torch.float32:
        tiles = FP8_SMALL_TILES
    return {
        f"triton {tuple(tile)} split {split}": partial(
            _tile, flat, x_scale, tile=tile, split=split, **epilogue
        )
        for tile in tiles
        for split in (SPLITS if -(-len(flat) // tile.rows) * -(-N // tile.columns) < 132 else (1,))
    }


def _tile(
    flat: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    **options: Any,
) -> Tensor:
    return product(flat, weight, bias, scales=(x_scale, weight_scale), **options)


def _candidates(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: Activation | None,
    out_scale: Tensor | None,
) -> Candidates:
    """Our tiles and, under "auto", quack's products, and torch's, with GELU and the conversion to
    e4m3 apart.
    """
    flat = rows(x.reshape(-1, x.shape[-1]))
    cold = weight, weight_scale, bias
    gelu = activation == "gelu_tanh"
    functions = _tiles(flat, x_scale, len(weight), gelu=gelu, out_scale=out_scale)
    if requested_backend() == "auto":
        if bias.dtype == torch.bfloat16:
            functions["torch"] = partial(
                _scaled_mm, flat, x_scale, activation=activation, out_scale=out_scale
            )
        functions |= _quack.fp8_candidates(flat, x_scale, *cold, gelu=gelu, out_scale=out_scale)
    scales = x_scale is not None, out_scale is not None
    question = "linear_quantized", activation, *scales, form(flat), *map(form, cold)
    return Candidates(question, functions, x.device, cold)


@linear_quantized.backend("triton", unsupported=_unsupported, candidates=_candidates)
def _triton(x: Tensor, x_scale: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    y: Tensor = _candidates(x, x_scale, weight, *rest).run()
    return y.view(*x.shape[:-1], len(weight))


def _scaled_mm(
    flat: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    activation: Activation | None,
    out_scale: Tensor | None,
) -> Tensor:
    scale = ones(len(flat), flat.device) if x_scale is None else x_scale
    y = torch._scaled_mm(
        flat, weight.t(), scale[:, None], weight_scale[None], bias=bias, out_dtype=bias.dtype,
        use_fast_accum=True
    )  # fmt: skip
    if out_scale is not None:
        return quantize_static(y, out_scale, activation)
    return gelu_tanh(y) if activation == "gelu_tanh" else y


def _check_residual(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> None:
    name = "linear_quantized_residual"
    expect_shape(name, "x", x, (None, None, None))
    expect_floating(name, x=x, residual=residual, gate=gate)
    _check(x, x_scale, weight, weight_scale, bias)
    expect_shape(name, "residual", residual, (*x.shape[:2], len(weight)))
    expect_shape(name, "gate", gate, (len(x), len(weight)))


def _example_residual(make: Make) -> Iterable[tuple[Any, ...]]:
    for B, T, K, N in ((1, 1, 32, 16), (2, 7, 96, 224), (3, 16, 1152, 96)):
        x, x_scale = quantize_rows.reference(make(B * T, K))
        for scale in (x_scale, None):
            yield x.view(B, T, K), scale, *layer(make, K, N), make(B, T, N), make(B, N)


@op(
    check=_check_residual,
    example=_example_residual,
    schema=(
        "(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale, Tensor bias, Tensor "
        "residual, Tensor gate) -> Tensor"
    ),
)
def linear_quantized_residual(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Tensor:
    """The last product of a branch, added to the residual stream: residual + gate *
    linear_quantized(x, x_scale, weight, weight_scale, bias).

    x (B, T, K), residual (B, T, N), gate (B, N), rows may be strided -> (B, T, N) in residual's
    dtype.
    """
    dtype = wide(residual, bias)
    y = _product(x, x_scale, weight, weight_scale, bias.to(dtype))
    return (residual.to(dtype) + gate.to(dtype)[:, None] * y).to(residual.dtype)


def _residual_candidates(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Candidates:
    flat = rows(x.reshape(-1, x.shape[-1]))
    epilogue = {"residual": residual.contiguous(), "gate": rows(gate), "tokens": x.shape[1]}
    functions = _tiles(flat, x_scale, len(weight), **epilogue)
    cold = weight, weight_scale, bias
    forms = map(form, (flat, *cold, residual, gate))
    question = "linear_quantized_residual", x_scale is not None, *forms
    return Candidates(question, functions, x.device, cold)


@linear_quantized_residual.backend(
    "triton", unsupported=_unsupported, candidates=_residual_candidates
)
def _triton_residual(x: Tensor, x_scale: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    y: Tensor = _residual_candidates(x, x_scale, weight, *rest).run()
    return y.view(*x.shape[:-1], len(weight))
