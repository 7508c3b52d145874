"""The ends of a DiT block's two branches in fp8, each as one operation, because the ways to compute
them differ in more than one kernel: in which the residual is added, and in whether the product
after attention is worth fp8 at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import adaln
from ._e4m3 import expect_e4m3
from ._op import op, requested_backend
from ._tune import Candidates, form
from .adaln import EPS
from .adaln_fp8 import _unsupported as _no_adaln
from .adaln_fp8 import adaln_quantized, gated_residual_adaln_quantized
from .arguments import Make, expect_floating, expect_shape
from .attention import attention
from .attention_fp8 import attention_quantized
from .linear import linear, linear_gated_residual
from .linear_fp8 import quantize_rows
from .linear_quantized import layer, linear_quantized, linear_quantized_residual

Ends = tuple[Tensor, Tensor, Tensor]
"""(residual stream, the next product's input in e4m3, the scales of its rows)."""


def _check_end(
    y: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, x: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor, eps: float = EPS
) -> None:  # fmt: skip
    name = "branch_end_fp8"
    adaln._check_residual(x, x, gate, shift, scale)
    expect_shape(name, "y", y, (*x.shape[:2], None))
    expect_shape(name, "weight", weight, (x.shape[2], y.shape[2]))
    linear_quantized.check(y, None, weight, weight_scale, bias)


def _example_end(make: Make) -> Iterable[tuple[Any, ...]]:
    for B, M, T, K, D in ((1, 1, 1, 32, 16), (4, 3, 7, 96, 224), (3, 3, 16, 1152, 96)):
        y = make(B, T, K).to(torch.float8_e4m3fn)
        yield y, *layer(make, K, D), make(B, T, D), make(M, D), make(M, D), make(M, D)


@op(
    check=_check_end,
    example=_example_end,
    schema=(
        "(Tensor y, Tensor weight, Tensor weight_scale, Tensor bias, Tensor x, Tensor gate, "
        "Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)"
    ),
)
def branch_end_fp8(
    y: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, x: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor, eps: float = EPS
) -> Ends:  # fmt: skip
    """The end of a branch and the start of the next: its last product in fp8, the residual, and the
    quantised adaLN.

    y (B, T, K) float8_e4m3fn, weight (D, K) float8_e4m3fn, weight_scale (D,) float32, with y's
    static scale in it, and bias (D,), as `linear_quantized` takes them; x (B, T, D); gate, shift,
    scale (B, D), or (N + 1, D) as `adaln_modulate` takes them ->
    gated_residual_adaln_quantized(x, linear_quantized(...), gate, shift, scale).
    """
    product = linear_quantized.reference(y, None, weight, weight_scale, bias)
    return gated_residual_adaln_quantized.reference(x, product, gate, shift, scale, eps)


def _end_candidates(
    y: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, x: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor, eps: float
) -> Candidates:  # fmt: skip
    """The residual added by adaLN's kernel, or by the product's."""

    def by_adaln(weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Ends:
        added = linear_quantized(y, None, weight, weight_scale, bias)
        return gated_residual_adaln_quantized(x, added, gate, shift, scale, eps)

    def by_product(weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Ends:
        total = linear_quantized_residual(y, None, weight, weight_scale, bias, x, gate)
        return total, *adaln_quantized(total, shift, scale, eps)

    functions = {"residual with adaLN": by_adaln}
    if len(gate) == len(x):
        functions["residual with the product"] = by_product
    cold = weight, weight_scale, bias
    forms = map(form, (y, *cold, x, gate, shift, scale))
    question = "branch_end_fp8", requested_backend(), *forms  # the parts choose by it
    return Candidates(question, functions, y.device, cold)


def _unsupported_end(y: Tensor, *rest: Any) -> str | None:
    return linear_quantized.backends["triton"].unsupported(y) or _no_adaln(rest[3])


@branch_end_fp8.backend("triton", unsupported=_unsupported_end, candidates=_end_candidates)
def _end_triton(*args: Any) -> Ends:
    ends: Ends = _end_candidates(*args).run()
    return ends


def _check_branch(
    qkv: Tensor, out_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    plain: Tensor | None, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> None:  # fmt: skip
    name, (B, T, _, heads, head_dim) = "attention_branch_fp8", qkv.shape
    attention_quantized.check(qkv, out_scale)
    expect_e4m3(name, weight=weight)
    expect_shape(name, "weight", weight, (x.shape[-1], heads * head_dim))
    y = weight[:1, :1].expand(B, T, heads * head_dim)
    _check_end(y, weight, weight_scale, bias, x, gate, shift, scale)
    if plain is not None:
        expect_floating(name, qkv=qkv, plain=plain)
        expect_shape(name, "plain", plain, tuple(weight.shape))


def _example_branch(make: Make) -> Iterable[tuple[Any, ...]]:
    for B, M, T, heads, d in ((1, 1, 1, 1, 32), (4, 3, 16, 4, 24), (2, 2, 7, 1, 96)):
        D = heads * d
        weight = make(D, D) / D**0.5
        out_scale = make(1).float().abs() / 256 + 1 / 256
        q, weight_scale = quantize_rows.reference(weight)
        ends = make(B, T, D), make(M, D), make(M, D), make(M, D)
        for plain in (weight, None):
            folded = weight_scale * out_scale
            yield make(B, T, 3, heads, d), out_scale, q, folded, make(D), plain, *ends


@op(
    check=_check_branch,
    example=_example_branch,
    schema=(
        "(Tensor qkv, Tensor out_scale, Tensor weight, Tensor weight_scale, Tensor bias, Tensor? "
        "plain, Tensor x, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, "
        "Tensor)"
    ),
)
def attention_branch_fp8(
    qkv: Tensor, out_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    plain: Tensor | None, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS
) -> Ends:  # fmt: skip
    """Attention and what follows to the start of the next branch: branch_end_fp8(
    attention_quantized(qkv, out_scale), weight, ...), see there.

    qkv (B, T, 3, heads, head_dim); out_scale (1,) float32, which is in weight_scale already.
    plain (D, D): the weight before it was quantised, in qkv's dtype, with which attention and the
    product may run in 16 bits instead, where a GPU was found to be faster so; with None they never
    do. By default, and in the reference, they run in fp8.
    """
    y = attention_quantized.reference(qkv, out_scale)
    rest = x, gate, shift, scale, eps
    return branch_end_fp8.reference(y, weight, weight_scale, bias, *rest)


def _branch_candidates(
    qkv: Tensor, out_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
    plain: Tensor | None, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Candidates:  # fmt: skip
    """In fp8, and with the plain weight in 16 bits: the residual added by adaLN's kernel, or by the
    product's.
    """

    def in_fp8(weight: Tensor, weight_scale: Tensor, bias: Tensor, *_: Tensor) -> Ends:
        y = attention_quantized(qkv, out_scale)
        return branch_end_fp8(y, weight, weight_scale, bias, x, gate, shift, scale, eps)

    def by_adaln(_: Tensor, __: Tensor, bias: Tensor, plain: Tensor) -> Ends:
        added = linear(attention(qkv), plain, bias)
        return gated_residual_adaln_quantized(x, added, gate, shift, scale, eps)

    def by_product(_: Tensor, __: Tensor, bias: Tensor, plain: Tensor) -> Ends:
        total = linear_gated_residual(attention(qkv), plain, bias, x, gate)
        return total, *adaln_quantized(total, shift, scale, eps)

    functions: dict[str, Callable[..., Ends]] = {"fp8": in_fp8}
    cold: tuple[Tensor, ...] = weight, weight_scale, bias
    if plain is not None and qkv.dtype == plain.dtype == bias.dtype != torch.float32:
        cold += (plain,)
        functions["16 bits, residual with adaLN"] = by_adaln
        if len(gate) == len(x):
            functions["16 bits, residual with the product"] = by_product
    forms = map(form, (qkv, *cold, x, gate, shift, scale))
    question = "attention_branch_fp8", requested_backend(), *forms
    return Candidates(question, functions, qkv.device, cold)


def _unsupported_branch(qkv: Tensor, *rest: Any) -> str | None:
    return attention_quantized.backends["triton"].unsupported(qkv) or _no_adaln(rest[5])


@attention_branch_fp8.backend(
    "triton", unsupported=_unsupported_branch, candidates=_branch_candidates
)
def _branch_triton(*args: Any) -> Ends:
    ends: Ends = _branch_candidates(*args).run()
    return ends
