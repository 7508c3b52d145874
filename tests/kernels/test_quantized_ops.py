"""Operations that take or give values in fp8 with known scales: their meaning, and their kernels in
Triton's interpreter, against float64.
"""

from __future__ import annotations

from typing import Any

import exact_e4m3
import pytest
import torch
import torch.nn.functional as F
from close import assert_close, relative_error
from ops import examples, mapped, tensors
from torch import Tensor

from flowturbo_kernels import (
    OPS,
    adaln_modulate,
    adaln_quantized,
    attention,
    attention_branch_fp8,
    attention_quantized,
    branch_end_fp8,
    gated_residual_adaln_quantized,
    linear_quantized,
    linear_quantized_residual,
    quantize_rows,
    quantize_static,
    use_backend,
)
from flowturbo_kernels._matmul import FP8_TILES, Tile, product

E4M3 = torch.float8_e4m3fn
NEW = [
    "adaln_quantized",
    "attention_branch_fp8",
    "attention_quantized",
    "branch_end_fp8",
    "gated_residual_adaln_quantized",
    "linear_quantized",
    "linear_quantized_residual",
    "quantize_static",
]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel is given holds NaN; the interpreter converts as a GPU does."""
    exact_e4m3.patch(monkeypatch)
    allocate = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *args, **kwargs: (
            t.fill_(float("nan"))
            if (t := allocate(*args, **kwargs)).is_floating_point() and t.device.type != "meta"
            else t
        ),
    )


def assert_rounded(q: Tensor, truth: Tensor, scale: Tensor, slack: float = 0.0) -> None:
    """q * scale is the truth but for half a step of e4m3, float32's roundings and the slack."""
    assert q.dtype == E4M3
    assert q.shape == truth.shape
    scale, slack = scale.double(), slack + 2.0**-20 * float(truth.abs().max())
    step = torch.maximum(truth.abs() / 8, scale * 2.0**-9)  # 3 bits; below 2^-6, steps of 2^-9
    assert ((q.double() * scale - truth).abs() <= 0.502 * step + slack).all()


def exact(x: Tensor, x_scale: Tensor | None, layer: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The product and bias of quantised operands, in float64."""
    weight, weight_scale, bias = layer
    rows = x.double() if x_scale is None else x.double() * x_scale.double().view(*x.shape[:-1], 1)
    return F.linear(rows, weight.double() * weight_scale.double()[:, None], bias.double())


def made_layer(K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return *quantize_rows.reference(torch.randn(N, K) / K**0.5), torch.randn(N).to(dtype)


def call(name: str, backend: str, *args: Any) -> Any:
    with use_backend(backend):
        return OPS[name](*args)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
WAYS = pytest.mark.parametrize("backend", BACKENDS)


@WAYS
@DTYPES
@pytest.mark.parametrize("B, T, D", [(1, 1, 8), (2, 7, 72), (2, 5, 1152)])
def test_adaln_uses_the_whole_range_of_every_row(B, T, D, dtype, backend):
    x, y = (torch.randn(B, T, D).to(dtype) for _ in range(2))
    shift, scale, gate = torch.randn(B, 6 * D).to(dtype).chunk(6, dim=1)[:3]
    total = x.double() + gate.double()[:, None] * y.double()
    truths = (
        adaln_modulate.reference(x.double(), shift.double(), scale.double()),
        adaln_modulate.reference(total, shift.double(), scale.double()),
    )
    plain = call("adaln_quantized", backend, x, shift, scale)
    added, *gated = call("gated_residual_adaln_quantized", backend, x, y, gate, shift, scale)
    assert added.dtype == dtype
    assert_close(added, total, torch.finfo(dtype).eps)
    for (q, row_scale), truth in zip((plain, gated), truths, strict=True):
        assert (row_scale.dtype, row_scale.shape) == (torch.float32, (B * T,))
        assert_close(row_scale, truth.abs().amax(2).flatten() / 448, 1e-5)
        assert q.double().abs().amax(2).eq(448).all()
        assert_rounded(q, truth, row_scale.view(B, T, 1))


@WAYS
@DTYPES
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_a_static_scale_divides_and_what_exceeds_it_saturates(activation, dtype, backend):
    x = (4 * torch.randn(3, 7, 200)).to(dtype)
    truth = F.gelu(x.double(), approximate="tanh") if activation else x.double()
    scale = truth.abs().max().float().view(1) / 448
    q = call("quantize_static", backend, x, scale, activation)
    assert_rounded(q, truth, scale)
    q = call("quantize_static", backend, x, scale / 4, activation)
    beyond = truth.abs() > 1.001 * 448 * scale.double() / 4
    assert beyond.any()
    assert q.double()[beyond].equal(448 * truth[beyond].sign())
    assert_rounded(q[~beyond], truth[~beyond].clamp(-112 * scale, 112 * scale), scale / 4)


@WAYS
def test_what_is_no_number_stays_none(backend):
    x, one = torch.tensor([[float("nan"), 1.0, -1e9]]), torch.ones(1)
    q = call("quantize_static", backend, x, one).float()
    assert q[0, 0].isnan()
    assert q[0, 1:].tolist() == [1, -448]
    if backend == "reference":  # of the others the interpreter warns
        x = torch.full((1, 1, 8), float("nan"))
        assert adaln_quantized(x, x[0], x[0])[0].float().isnan().all()
        qkv = torch.full((1, 2, 3, 1, 8), float("nan"))
        assert attention_quantized(qkv, one).float().isnan().all()


@WAYS
@DTYPES
@pytest.mark.parametrize("rows", [True, False], ids=["a scale a row", "a static scale"])
@pytest.mark.parametrize("M, K, N", [(1, 64, 16), (7, 96, 40), (130, 192, 136)])
def test_products_err_by_their_sums_alone(M, K, N, rows, dtype, backend):
    (x, x_scale), layer = quantize_rows.reference(torch.randn(M, K)), made_layer(K, N, dtype)
    if not rows:
        layer, x_scale = (layer[0], layer[1] * 0.01, layer[2]), None
    bound = 1e-6 + torch.finfo(dtype).eps / 2
    truth = exact(x, x_scale, layer)
    got = call("linear_quantized", backend, x, x_scale, *layer)
    assert got.dtype == dtype
    assert_close(got, truth, bound)
    gelu = F.gelu(truth, approximate="tanh")
    assert_close(call("linear_quantized", backend, x, x_scale, *layer, "gelu_tanh"), gelu, bound)
    scale = 0.7 * gelu.abs().max().float().view(1) / 448
    q = call("linear_quantized", backend, x, x_scale, *layer, "gelu_tanh", scale)
    most = 448 * float(scale)
    assert_rounded(q, gelu.clamp(-most, most), scale)
    assert q.double().abs().max() == 448


@WAYS
@DTYPES
@pytest.mark.parametrize("rows", [True, False], ids=["a scale a row", "a static scale"])
@pytest.mark.parametrize("B, T, K, N", [(2, 7, 96, 40), (3, 50, 192, 136)])
def test_products_add_to_the_residual(B, T, K, N, rows, dtype, backend):
    x, x_scale = quantize_rows.reference(torch.randn(B * T, K))
    layer = made_layer(K, N, dtype)
    if not rows:
        layer, x_scale = (layer[0], layer[1] * 0.01, layer[2]), None
    residual, gate = torch.randn(B, T, N).to(dtype), torch.randn(B, 3 * N).to(dtype)[:, N : 2 * N]
    x = x.view(B, T, K)
    got = call("linear_quantized_residual", backend, x, x_scale, *layer, residual, gate)
    truth = residual.double() + gate.double()[:, None] * exact(x, x_scale, layer)
    assert got.dtype == dtype
    assert_close(got, truth, 1e-6 + torch.finfo(dtype).eps / 2)


def strided(t: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    return torch.stack([t, 9 * t], dim=1)[:, 0]


@WAYS
@pytest.mark.parametrize("name", ["linear_quantized", "linear_quantized_residual", "linear_fp8"])
def test_scales_may_be_strided(name, backend):
    dense = list(examples(name, torch.float32))[2]
    args = [strided(t) if isinstance(t, Tensor) and t.ndim == 1 else t for t in dense]
    assert any(isinstance(t, Tensor) and not t.is_contiguous() for t in args)
    assert_close(call(name, backend, *args), call(name, "reference", *dense), 1e-5)


@interpreted
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("tile", [*FP8_TILES, Tile(32, 64, 32, 4, 2)])
def test_every_tile_and_split_has_every_epilogue(tile, split):
    M, K, N, tokens = 70, 256, 136, 35
    (x, x_scale), layer = (
        quantize_rows.reference(torch.randn(M, K)),
        made_layer(K, N, torch.float32),
    )
    weight, weight_scale, bias = layer
    scales, y = (x_scale, weight_scale), exact(x, x_scale, layer)
    scale = y.abs().max().float().view(1) / 448
    q = product(x, weight, bias, tile, split, scales=scales, out_scale=scale)
    assert_rounded(q, y, scale)
    residual, gate = torch.randn(M, N), torch.randn(M // tokens, N)
    added = {"residual": residual, "gate": gate, "tokens": tokens}
    truth = residual.double() + gate.double().repeat_interleave(tokens, 0) * y
    assert_close(product(x, weight, bias, tile, split, scales=scales, **added), truth, 1e-6)


@WAYS
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 3, 1, 8), (2, 16, 3, 4, 24), (1, 70, 3, 2, 72)])
def test_attention_gives_e4m3(shape, dtype, backend):
    qkv = torch.randn(shape).to(dtype)
    truth = attention.reference(qkv.double())
    scale = truth.abs().max().float().view(1) / 448
    q = call("attention_quantized", backend, qkv, scale)
    # In 16 bits probabilities are rounded before they weigh the values.
    slack = float(truth.abs().max()) * torch.finfo(dtype).eps
    assert_rounded(q, truth, scale, slack)
    half = call("attention_quantized", backend, qkv, scale / 2).double()
    beyond = truth.abs() > 1.01 * truth.abs().max() / 2
    assert half[beyond].equal(448 * truth[beyond].sign())


# Branches: each of their ways, and what these cost.


def made_branch(dtype: torch.dtype) -> tuple[Any, ...]:
    B, T, heads, d = 2, 9, 2, 48
    D = heads * d
    qkv, plain = torch.randn(B, T, 3, heads, d), torch.randn(D, D) / D**0.5
    scale = attention.reference(qkv.double()).abs().max().float().view(1) / 224
    weight, weight_scale = quantize_rows.reference(plain)
    ends = torch.randn(B, T, D), *(torch.randn(B, D) for _ in range(3))
    cast = mapped((torch.randn(D), plain, *ends), lambda t: t.to(dtype))
    return qkv.to(dtype), scale, weight, weight_scale * scale, *cast, 1e-6


@pytest.fixture
def every(monkeypatch):
    """All candidates of an operation's backend, by name: their results."""

    def results(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
        with use_backend("triton"):
            found = OPS[name].backends["triton"].candidates(*args)
            return {which: run(*found.cold) for which, run in found.functions.items()}

    return results


@interpreted
def test_every_way_to_end_a_branch_errs_as_fp8_does(every):
    args = made_branch(torch.float16)
    qkv, out_scale, weight, weight_scale, bias, plain, x, gate, shift, scale, _ = args
    y = attention.reference(qkv.double())
    branch = F.linear(y, plain.double(), bias.double())
    total = x.double() + gate.double()[:, None] * branch
    truth = adaln_modulate.reference(total, shift.double(), scale.double())
    found = every("attention_branch_fp8", args)
    assert list(found) == [
        "fp8",
        "16 bits, residual with adaLN",
        "16 bits, residual with the product",
    ]
    for name, (got, q, row_scale) in found.items():
        back = q.double() * row_scale.double().view(2, 9, 1)
        assert_close(got, total, 0.03 if name == "fp8" else 1e-3)
        assert_close(back, truth, 0.06 if name == "fp8" else 0.04)
    assert relative_error(found["fp8"][0], total) > 4e-3  # it is quantised

    y8 = attention_quantized.reference(qkv, out_scale)
    ends = y8, weight, weight_scale, bias, x, gate, shift, scale, 1e-6
    total = x.double() + gate.double()[:, None] * exact(y8, None, (weight, weight_scale, bias))
    truth = adaln_modulate.reference(total, shift.double(), scale.double())
    found = every("branch_end_fp8", ends)
    assert list(found) == ["residual with adaLN", "residual with the product"]
    for got, q, row_scale in (*found.values(), branch_end_fp8.reference(*ends)):
        assert_close(got, total, 1e-3)
        assert_close(q.double() * row_scale.double().view(2, 9, 1), truth, 0.04)


@interpreted
def test_without_the_plain_weight_there_is_fp8_alone(every):
    args = list(made_branch(torch.float16))
    args[5] = None
    assert list(every("attention_branch_fp8", tuple(args))) == ["fp8"]
    assert list(every("attention_branch_fp8", made_branch(torch.float32))) == ["fp8"]


def test_a_branch_is_its_operations():
    qkv, out_scale, weight, weight_scale, bias, plain, x, *rest = made_branch(torch.float32)
    y = attention_quantized(qkv, out_scale)
    product = linear_quantized(y, None, weight, weight_scale, bias)
    expected = gated_residual_adaln_quantized(x, product, *rest)
    got = attention_branch_fp8(qkv, out_scale, weight, weight_scale, bias, plain, x, *rest)
    assert all(a.double().equal(b.double()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", NEW)
def test_opcheck(name):
    case = list(examples(name, torch.float32))[1]
    args = OPS[name]._positional(case, {})
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(OPS[name].library, args, test_utils=checks)


@pytest.mark.parametrize("name", NEW)
@WAYS
def test_inputs_are_left_alone(name, backend):
    for case in list(examples(name, torch.float32))[:3]:
        before = mapped(case, Tensor.clone)
        call(name, backend, *case)
        for a, b in zip(tensors(case), tensors(before), strict=True):
            assert a.view(torch.uint8).equal(b.view(torch.uint8))


def test_refusals():
    x, (q, s), b = torch.randn(2, 32), quantize_rows(torch.randn(4, 32)), torch.zeros(4)
    x8, x_scale = quantize_rows(x)
    one = torch.ones(1)
    for message, args in (
        (r"x must be torch\.float8_e4m3fn", (x, x_scale, q, s, b)),
        (r"weight must be torch\.float8_e4m3fn", (x8, x_scale, q.float(), s, b)),
        (r"x_scale must be torch\.float32", (x8, x_scale.half(), q, s, b)),
        (r"out_scale must be torch\.float32", (x8, None, q, s, b, None, one.double())),
    ):
        with pytest.raises(TypeError, match=f"linear_quantized: {message}"):
            linear_quantized(*args)
    for message, args in (
        ("x_scale must have shape", (x8, x_scale[:1], q, s, b)),
        ("weight_scale must have shape", (x8, x_scale, q, s[:3], b)),
        ("out_scale must have shape", (x8, None, q, s, b, None, torch.ones(2))),
        ("activation must be", (x8, None, q, s, b, "relu")),
    ):
        with pytest.raises(ValueError, match=f"linear_quantized: {message}"):
            linear_quantized(*args)
    with pytest.raises(ValueError, match="linear_quantized_residual: gate must have shape"):
        linear_quantized_residual(x8[None], None, q, s, b, torch.zeros(1, 2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="attention_quantized: out_scale must have shape"):
        attention_quantized(torch.zeros(1, 2, 3, 1, 8), torch.ones(2))
    with pytest.raises(TypeError, match=r"quantize_static: scale must be torch\.float32"):
        quantize_static(x, one.half())
    with pytest.raises(ValueError, match="quantize_static: activation"):
        quantize_static(x, one, "relu")
    with pytest.raises(ValueError, match="adaln_modulate: shift must have shape"):
        adaln_quantized(torch.zeros(1, 2, 8), torch.zeros(2, 8), torch.zeros(1, 8))
    args = list(made_branch(torch.float32))
    args[5] = args[5][:1]
    with pytest.raises(ValueError, match="attention_branch_fp8: plain must have shape"):
        attention_branch_fp8(*args)
