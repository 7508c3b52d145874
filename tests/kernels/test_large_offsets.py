"""Numbers further apart than 32 bits can count, in memory of which hardly any is touched."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from torch import Tensor

from flowturbo_kernels import OPS, use_backend
from flowturbo_kernels.linear_fp8 import quantize_rows

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)


def far_apart(rows: Tensor) -> Tensor:
    """The same rows, of which the third begins 2^31 numbers behind the first."""
    memory = torch.empty(2**31 + rows.shape[1], dtype=rows.dtype)
    apart = memory.as_strided(rows.shape, (2**30, 1))
    return apart.copy_(rows)


@pytest.mark.parametrize("name", ["linear_gated_residual", "linear_quantized_residual"])
def test_gates_of_images_may_lie_far_apart(name):
    """As those of large batches do in the modulations of all blocks."""
    B, T, K, N = 3, 2, 16, 32
    residual, gate = torch.randn(B, T, N), torch.randn(B, N).half()
    bias, weight, x = torch.randn(N), torch.randn(N, K), torch.randn(B * T, K)
    if name == "linear_quantized_residual":
        q, scale = quantize_rows.reference(x)
        layer = q.view(B, T, K), scale, *quantize_rows.reference(weight), bias
    else:
        layer = x.view(B, T, K), weight, bias
    exact = OPS[name].reference(*layer, residual, gate)
    with use_backend("triton"):
        assert_close(OPS[name](*layer, residual, far_apart(gate)), exact, 1e-5)
