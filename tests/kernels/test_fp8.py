"""fp8 products: what quantising means, what it costs in accuracy, and the kernels on operands that
are quantised already.
"""

from __future__ import annotations

import hopper
import pytest
import torch
from close import assert_close, relative_error
from ops import DTYPES
from torch import Tensor

from flowturbo_kernels import OPS, linear, linear_fp8, quantize_rows, use_backend
from flowturbo_kernels._matmul import EXACT_TILES, MASKED_TILES, WIDE_TILES, Tile, product

E4M3 = torch.float8_e4m3fn
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)


def test_every_row_uses_the_whole_range_and_errs_by_half_a_step():
    x = (
        torch.randn(7, 96, dtype=torch.float64)
        * torch.logspace(-5, 4, 7, dtype=torch.float64)[:, None]
    )
    q, scale = quantize_rows(x)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (E4M3, torch.float32, (7, 96), (7,))
    assert q.double().abs().amax(1).eq(448).all()
    back = q.double() * scale.double()[:, None]
    step = torch.maximum(
        x.abs() / 8, scale.double()[:, None] * 2.0**-9
    )  # 3 bits of mantissa; below 2^-6, steps of 2^-9
    assert ((back - x).abs() <= 0.5001 * step).all()


def test_a_row_of_zeros_stays_zeros():
    q, scale = quantize_rows(torch.zeros(2, 16))
    assert q.double().eq(0).all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_it_is_the_linear_layer_to_fp8s_accuracy(dtype, activation):
    x, weight, bias = (
        torch.randn(3, 5, 384).to(dtype),
        torch.randn(96, 384) / 384**0.5,
        torch.randn(96).to(dtype),
    )
    truth = linear(x.double(), weight.double(), bias.double(), activation)
    y = linear_fp8(x, *quantize_rows(weight), bias, activation)
    assert (y.dtype, y.shape) == (dtype, (3, 5, 96))
    error = relative_error(y, truth)
    assert (
        0.005 < error < 0.05
    )  # two operands of 3 bits; much less would mean that nothing was quantised


@pytest.mark.parametrize("name", ["quantize_rows", "linear_fp8"])
def test_opcheck(name):
    args = OPS[name]._positional(list(OPS[name].example(lambda *shape: torch.randn(*shape)))[1], {})
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "quantize_rows":
        checks.append("test_schema")  # which in torch 2.13 can't compare inputs in fp8
    torch.library.opcheck(OPS[name].library, args, test_utils=checks)


def test_refusals():
    x, (q, s), b = torch.randn(2, 32), quantize_rows(torch.randn(4, 32)), torch.zeros(4)
    with pytest.raises(TypeError, match="linear_fp8: weight must be"):
        linear_fp8(x, q.float(), s, b)
    with pytest.raises(TypeError, match="linear_fp8: weight_scale must be"):
        linear_fp8(x, q, s.half(), b)
    with pytest.raises(ValueError, match="linear_fp8: weight_scale must have shape"):
        linear_fp8(x, q, s[:3], b)
    with pytest.raises(ValueError, match="linear_fp8: weight must have shape"):
        linear_fp8(x[:, :16], q, s, b)
    with pytest.raises(ValueError, match="linear_fp8: activation"):
        linear_fp8(x, q, s, b, "relu")
    with pytest.raises(ValueError, match="quantize_rows: x must have shape"):
        quantize_rows(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    "what, low, high", [({}, 0.4, 0.6), ({"bits": 12}, 1.0, 2.0), ({"promote": 128}, 0.05, 0.2)]
)
def test_the_bound_on_sums_of_fp8_is_twice_what_hopper_errs_by(what, low, high):
    """As its tensor cores are known to sum; one bit less passes the bound, and promoted sums are
    far below it.
    """
    (x, _), (weight, _) = (quantize_rows(torch.randn(48, 1152)) for _ in range(2))
    error = relative_error(hopper.product(x, weight, **what), x.double() @ weight.double().T)
    assert low * hopper.FP8_SUMS < error < high * hopper.FP8_SUMS


def test_sums_are_cut_off_as_on_hopper():
    """A sum of 2^13 keeps products of 1 and loses those of a half, each on its own, of either
    sign.
    """
    x = torch.zeros(1, 32)
    x[0, :2] = 256
    weight = torch.zeros(4, 32)
    weight[:, 0] = 32
    weight[1, 2], weight[2, 2:6], weight[3, 2:6] = 1, 0.5, -0.5
    x[0, 2:] = 1
    got = hopper.product(x.to(E4M3), weight.to(E4M3))
    assert got.tolist() == [[8192, 8193, 8192, 8192]]
    assert hopper.product(x.to(E4M3), weight.to(E4M3), bits=23).tolist() == [
        [8192, 8193, 8194, 8190]
    ]


# The interpreter truncates where it converts to fp8, so kernels get operands that are quantised
# already.


@interpreted
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("M, K, N, split", [(7, 96, 40, 1), (33, 200, 130, 2), (1, 64, 16, 4)])
def test_the_product_of_quantised_operands_is_exact_but_for_its_sums(M, K, N, split, gelu):
    (x, x_scale), (weight, weight_scale), bias = (
        quantize_rows(torch.randn(M, K)),
        quantize_rows(torch.randn(N, K)),
        torch.randn(N),
    )
    truth = (x.double() * x_scale.double()[:, None]) @ (
        weight.double() * weight_scale.double()[:, None]
    ).T + bias.double()
    truth = torch.nn.functional.gelu(truth, approximate="tanh") if gelu else truth
    got = product(
        x, weight, bias, Tile(16, 32, 32, 4, 1), split, gelu=gelu, scales=(x_scale, weight_scale)
    )
    assert_close(got, truth, 1e-6)


@interpreted
def test_the_quantising_kernel_scales_as_the_reference_and_errs_by_a_step():
    x = torch.randn(5, 72)
    with use_backend("triton"):
        q, scale = quantize_rows(x)
    assert scale.equal(quantize_rows(x)[1])
    assert relative_error(q.double() * scale.double()[:, None], x) < 0.08


# Every tile and split of the 16-bit and float32 product.


@interpreted
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("tile", [*WIDE_TILES, *MASKED_TILES, *EXACT_TILES])
def test_every_tile_and_split(tile, split):
    M, K, N, tokens = 70, 200, 136, 35
    x, weight, bias = (
        torch.randn(M, 2 * K).half()[:, :K],
        (torch.randn(N, K) / K**0.5).half(),
        torch.randn(N).half(),
    )
    residual, gate = torch.randn(M, N).half(), torch.randn(M // tokens, 2 * N).half()[:, N:]

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [t.double() for t in tensors]

    y = torch.nn.functional.linear(*wide(x, weight, bias))
    assert_close(product(x, weight, bias, tile, split), y, 3e-4)
    assert_close(
        product(x, weight, bias, tile, split, gelu=True),
        torch.nn.functional.gelu(y, approximate="tanh"),
        3e-4,
    )
    r, g = wide(residual, gate)
    got = product(x, weight, bias, tile, split, residual=residual, gate=gate, tokens=tokens)
    assert_close(got, r + g.repeat_interleave(tokens, 0) * y, 3e-4)
