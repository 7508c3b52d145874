"""Quantising to fp8 (e4m3), and matrix products that quantise their input row by row. They change
results, so nothing uses them unless a caller asks by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._e4m3 import (
    LARGEST,
    TINY,
    expect_layer,
    expect_scale,
    in_e4m3,
    no_e4m3,
    saturated,
)
from ._matmul import FP8_TILES, MASKED_TILES, Tile, gelu, product
from ._op import op, requested_backend
from ._triton import in_turn, kernel, next_power_of_2, rows, tl
from ._tune import Candidates, form
from .arguments import Make, expect_activation, expect_floating, expect_shape, wide
from .batch_invariant import gelu_tanh
from .linear import Activation


@kernel
def _quantize_kernel(
    x, out, scale, x_m, K: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    in_turn(PDL)
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    row = tl.load(x + m * x_m + k, mask=k < K, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(row)) / 448.0, TINY)
    tl.store(scale + m, s)
    tl.store(out + m * K + k, (row / s).to(out.dtype.element_ty), mask=k < K)


def _check_quantize(x: Tensor) -> None:
    expect_floating("quantize_rows", x=x)
    expect_shape("quantize_rows", "x", x, (None, None))


def _example_quantize(make: Make) -> Iterable[tuple[Any, ...]]:
    for M, K in ((1, 16), (7, 72), (32, 1152)):
        yield (make(M, K),)


@op(check=_check_quantize, example=_example_quantize, schema="(Tensor x) -> (Tensor, Tensor)")
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> (q (M, K) in float8_e4m3fn, scale (M,) float32), x ~ q * scale: every row's
    largest magnitude becomes 448.
    """
    values = x.to(wide(x))
    scale = (values.abs().amax(dim=1) / LARGEST).clamp(min=TINY)
    return (values / scale[:, None]).to(torch.float8_e4m3fn), scale.to(torch.float32)


@quantize_rows.backend("triton", unsupported=no_e4m3)
def _quantize_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    x = rows(x)
    out, scale = _quantized_like(x)
    K = x.shape[1]
    _quantize_kernel.launch(
        (len(x),), x, out, scale, x.stride(0), K, TINY, next_power_of_2(K), num_warps=4
    )
    return out, scale


def _quantized_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised results of `quantize_rows`."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return out, torch.empty(len(x), dtype=torch.float32, device=x.device)


@kernel
def _quantize_static_kernel(
    x, scale, out, size, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    in_turn(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    if GELU:
        y = gelu(y)
    tl.store(out + i, saturated(y, scale), mask=i < size)


def _check_static(x: Tensor, scale: Tensor, activation: Activation | None = None) -> None:
    expect_floating("quantize_static", x=x, scale=scale)
    expect_scale("quantize_static", "scale", scale, 1)
    expect_activation("quantize_static", activation)


def _example_static(make: Make) -> Iterable[tuple[Any, ...]]:
    for M, K in ((1, 16), (7, 72), (32, 1152)):
        for activation in (None, "gelu_tanh"):
            yield make(M, K), make(1).float().abs() / 256 + 1 / 256, activation


@op(
    check=_check_static,
    example=_example_static,
    schema="(Tensor x, Tensor scale, str? activation) -> Tensor",
)
def quantize_static(x: Tensor, scale: Tensor, activation: Activation | None = None) -> Tensor:
    """activation(x) / scale in e4m3, for a scale that is known beforehand, (1,) float32.

    x of any shape -> float8_e4m3fn of that shape. What exceeds 448 times the scale becomes that.
    """
    values = x.to(wide(x))
    return in_e4m3(gelu_tanh(values) if activation else values, scale)


def _no_static(x: Tensor, *_: Any) -> str | None:
    return no_e4m3(x[..., None]) if x.ndim else "x is a scalar"


@quantize_static.backend("triton", unsupported=_no_static)
def _quantize_static_triton(x: Tensor, scale: Tensor, activation: Activation | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _quantize_static_kernel.launch(
        (-(-x.numel() // 2048),), x, scale, out, x.numel(), activation is not None, 2048
    )
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: Activation | None = None,
) -> None:
    expect_floating("linear_fp8", x=x, weight=weight, weight_scale=weight_scale, bias=bias)
    if x.ndim < 1:
        raise ValueError("linear_fp8: x must have at least one dimension, got a scalar")
    expect_layer("linear_fp8", x.shape[-1], weight, weight_scale, bias)
    expect_activation("linear_fp8", activation)


def _example(make: Make) -> Iterable[tuple[Any, ...]]:
    for M, K, N in ((1, 32, 16), (7, 96, 224), (40, 1152, 96)):
        for activation in (None, "gelu_tanh"):
            yield make(M, K), *quantize_rows.reference(make(N, K) / K**0.5), make(N), activation


@op(
    check=_check,
    example=_example,
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor bias, str? activation) -> Tensor",
)
def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: Activation | None = None,
) -> Tensor:
    """`linear` with both operands in fp8: x is quantised row by row here, the weight beforehand.

    x (..., K), 16 bits or float32; weight (N, K) float8_e4m3fn and weight_scale (N,) float32, from
    `quantize_rows`; bias (N,) -> (..., N) in x's dtype. Sums in float32. The relative error of a
    product is about 4 %, since e4m3 has 3 bits of mantissa.
    """
    dtype = wide(x)
    q, scale = quantize_rows.reference(x.reshape(-1, x.shape[-1]))
    y = (q.to(dtype) @ weight.to(dtype).t()) * scale.to(dtype)[:, None] * weight_scale.to(
        dtype
    ) + bias.to(dtype)
    y = gelu_tanh(y) if activation == "gelu_tanh" else y
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


def _unsupported(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, activation: Activation | None
) -> str | None:
    return no_e4m3(x) or (None if x.dtype == bias.dtype else "x and bias are of several dtypes")


def _candidates(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    activation: Activation | None,
) -> Candidates:
    """For a product of quantised rows: our tiles and, under "auto", torch's scaled product."""
    gelu = activation == "gelu_tanh"
    functions: dict[str, Callable[..., Tensor]] = {
        f"triton {tuple(tile)}": partial(_tile, q, scale, tile=tile, gelu=gelu)
        for tile in (FP8_TILES if q.shape[1] % 64 == 0 else MASKED_TILES)
    }
    if requested_backend() == "auto" and bias.dtype == torch.bfloat16:
        functions["torch"] = partial(_scaled_mm, q, scale, gelu=gelu)
    cold = weight, weight_scale, bias
    return Candidates(
        ("linear_fp8", activation, form(q), *map(form, cold)), functions, q.device, cold
    )


def _candidates_of_rows(x: Tensor, *rest: Any) -> Candidates:
    return _candidates(*_quantized_like(x.reshape(-1, x.shape[-1])), *rest)


@linear_fp8.backend("triton", unsupported=_unsupported, candidates=_candidates_of_rows)
def _fp8_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, activation: Activation | None
) -> Tensor:
    q, scale = _quantize_triton(x.reshape(-1, x.shape[-1]))
    y: Tensor = _candidates(q, scale, weight, weight_scale, bias, activation).run()
    return y.view(*x.shape[:-1], len(weight))


def _tile(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    tile: Tile,
    gelu: bool,
) -> Tensor:
    return product(q, weight, bias, tile, gelu=gelu, scales=(scale, weight_scale))


def _scaled_mm(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, *, gelu: bool
) -> Tensor:
    y = torch._scaled_mm(
        q, weight.t(), scale[:, None], weight_scale[None], bias=bias, out_dtype=bias.dtype,
        use_fast_accum=True
    )  # fmt: skip
    return gelu_tanh(y) if gelu else y
