"""A matrix product with its epilogue: bias, or bias and tanh-GELU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from ._op import Make, expect_floating, expect_one_dtype, expect_shape, op
from ._place import gelu_tanh, matmul

Activation = Literal["gelu_tanh"]


def _check(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None = None) -> None:
    expect_floating("linear", x=x, weight=weight, bias=bias)
    expect_one_dtype("linear", x=x, weight=weight, bias=bias)
    if x.ndim < 1:
        raise ValueError("linear: x must have at least one dimension, got a scalar")
    expect_shape("linear", "weight", weight, (None, x.shape[-1]))
    expect_shape("linear", "bias", bias, (weight.shape[0],))
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"linear: activation must be None or 'gelu_tanh', got {activation!r}")


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for M, K, N in ((1, 8, 8), (7, 72, 216), (32, 96, 384), (128, 1152, 1152)):
        for activation in (None, "gelu_tanh"):
            yield make(M, K), make(N, K) / K**0.5, make(N), activation


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor weight, Tensor bias, str? activation) -> Tensor",
)
def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,), through tanh-GELU if asked -> (..., N)."""
    y = matmul(x, weight, bias)
    return gelu_tanh(y) if activation == "gelu_tanh" else y
