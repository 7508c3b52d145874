"""A matrix product with its epilogue: bias; bias and tanh-GELU; bias, gate and residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import _quack
from ._matmul import EXACT_TILES, MASKED_TILES, SPLITS, TILES, WIDE_TILES, Tile, product
from ._op import op, requested_backend
from ._triton import rows
from ._tune import Candidates, form
from .arguments import (
    Make,
    expect_activation,
    expect_floating,
    expect_one_dtype,
    expect_shape,
    wide,
)
from .batch_invariant import gelu_tanh, gelu_tanh_bfloat16, matmul, multipliable

Activation = Literal["gelu_tanh"]


def _check(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None = None) -> None:
    expect_floating("linear", x=x, weight=weight, bias=bias)
    expect_one_dtype("linear", x=x, weight=weight, bias=bias)
    if x.ndim < 1:
        raise ValueError("linear: x must have at least one dimension, got a scalar")
    expect_shape("linear", "weight", weight, (None, x.shape[-1]))
    expect_shape("linear", "bias", bias, (weight.shape[0],))
    expect_activation("linear", activation)


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for M, K, N in ((1, 8, 8), (7, 72, 216), (32, 96, 384), (40, 1152, 96)):
        for activation in (None, "gelu_tanh"):
            yield make(M, K), make(N, K) / K**0.5, make(N), activation


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor weight, Tensor bias, str? activation) -> Tensor",
)
def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,), through the activation if there is
    one -> (..., N).
    """
    y = matmul(x, weight, bias)
    return gelu_tanh(y) if activation == "gelu_tanh" else y


@linear.cpu_bfloat16
def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return matmul(x, weight, bias)
    return gelu_tanh_bfloat16(matmul(*multipliable(x, weight, bias)))


def _mixed_dtypes(x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> str | None:
    same = x.dtype == weight.dtype == bias.dtype
    return None if same else "x, weight and bias are of several dtypes, under autocast"


def _tiles(flat: Tensor, weight: Tensor, **epilogue: Any) -> dict[str, Callable[..., Tensor]]:
    """The kernel's candidates for a product of rows `flat` (M, K): functions of weight and bias."""
    tilings = _tilings(
        *flat.shape, len(weight), flat.dtype == torch.float32, "residual" in epilogue
    )
    return {
        name: partial(product, flat, tile=tile, split=split, **epilogue)
        for name, tile, split in tilings
    }


@functools.lru_cache(1024)
def _tilings(M: int, K: int, N: int, exact: bool, residual: bool) -> list[tuple[str, Tile, int]]:
    """Tiles by name, and, where they leave most of a GPU idle, splits of K."""
    tiles: tuple[Tile, ...] = TILES if residual else WIDE_TILES
    if exact:
        tiles = EXACT_TILES
    elif K % 64:
        tiles = MASKED_TILES
    return [
        (f"triton {tuple(tile)} split {split}", tile, split)
        for tile in tiles
        for split in (SPLITS if -(-M // tile.rows) * -(-N // tile.columns) < 132 else SPLITS[:1])
    ]


def _candidates(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None
) -> Candidates:
    """Our tiles and, under "auto", torch's product, cuBLASLt's GELU epilogue, which on CUDA is
    torch._addmm_activation, and quack's products where that is installed.
    """
    flat = rows(x.reshape(-1, x.shape[-1]))
    gelu = activation == "gelu_tanh"
    functions = _tiles(flat, weight, gelu=gelu)
    if requested_backend() == "auto":
        functions = {"torch": partial(linear.reference, flat, activation=activation), **functions}
        if gelu and x.dtype != torch.float32:  # for which cuBLASLt's accuracy is not documented
            functions = {"cublaslt gelu": partial(_product_with_gelu, flat), **functions}
        functions |= _quack.linear(flat, weight, bias, gelu)
    return Candidates(
        ("linear", activation, form(flat), form(weight), form(bias)),
        functions,
        x.device,
        (weight, bias),
    )


def _product_with_gelu(flat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, flat, weight.t(), use_gelu=True)


@linear.backend("triton", unsupported=_mixed_dtypes, candidates=_candidates)
def _linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None
) -> Tensor:
    y: Tensor = _candidates(x, weight, bias, activation).run()
    return y.view(*x.shape[:-1], len(weight))


def _check_gated(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor) -> None:
    name = "linear_gated_residual"
    expect_floating(name, x=x, weight=weight, bias=bias, residual=residual, gate=gate)
    expect_one_dtype(name, x=x, weight=weight, bias=bias)
    expect_shape(name, "x", x, (None, None, None))
    expect_shape(name, "weight", weight, (None, x.shape[2]))
    expect_shape(name, "bias", bias, (weight.shape[0],))
    expect_shape(name, "residual", residual, (*x.shape[:2], weight.shape[0]))
    expect_shape(name, "gate", gate, (x.shape[0], weight.shape[0]))


def _example_gated(make: Make) -> Iterable[tuple[Any, ...]]:
    for B, T, K, N in ((1, 1, 8, 8), (2, 7, 72, 216), (3, 16, 384, 96), (2, 9, 1152, 160)):
        yield make(B, T, K), make(N, K) / K**0.5, make(N), make(B, T, N), make(B, N)


@op(
    check=_check_gated,
    example=_example_gated,
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor gate) -> Tensor",
)
def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor
) -> Tensor:
    """The last product of a branch, added to the residual stream: residual + gate * (x times weight
    transposed, plus bias).

    x (B, T, K), weight (N, K), bias (N,), residual (B, T, N), gate (B, N), rows may be strided ->
    (B, T, N) in residual's dtype.
    """
    y = matmul(x, weight, bias)
    dtype = wide(residual, y)
    return (residual.to(dtype) + gate.to(dtype)[:, None] * y.to(dtype)).to(residual.dtype)


def _gated_candidates(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor
) -> Candidates:
    flat = rows(x.reshape(-1, x.shape[-1]))
    functions = _tiles(
        flat, weight, residual=residual.contiguous(), gate=rows(gate), tokens=x.shape[1]
    )
    if requested_backend() == "auto":
        functions = {
            "torch": partial(linear_gated_residual.reference, x, residual=residual, gate=gate),
            **functions,
            **_quack.linear_gated_residual(x, weight, bias, residual, gate),
        }
    question = "linear_gated_residual", *map(form, (x, weight, bias, residual, gate))
    return Candidates(question, functions, x.device, (weight, bias))


@linear_gated_residual.backend("triton", unsupported=_mixed_dtypes, candidates=_gated_candidates)
def _gated_triton(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor
) -> Tensor:
    y: Tensor = _gated_candidates(x, weight, bias, residual, gate).run()
    return y.view(*x.shape[:-1], len(weight))
