"""Operations on values that are quantised already, on a GPU: every candidate at real sizes, and
captured.
"""

from __future__ import annotations

from typing import Any

import fake_cuda
import pytest
import torch
from close import assert_close
from hopper import FP8_SUMS
from ops import FP8, case, mapped, tensors
from replays import assert_replays
from torch import Tensor

from flowturbo_kernels import OPS, quantize_static, sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
REAL = sum(1 for _ in sizes.sit_fp8(lambda *shape: torch.empty(*shape, device="meta"), 1))


@pytest.fixture(autouse=True)
def needs_e4m3():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89 or later")


def cuda(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def dequantised(results: Any) -> list[Tensor]:
    """With a scale a row after a tensor in e4m3 both as one; other tensors as they are."""
    found: list[Tensor] = []
    for t in tensors(results):
        if found and found[-1].dtype == torch.float8_e4m3fn and t.dtype == torch.float32:
            found[-1] = found[-1].double() * t.double().view(*found[-1].shape[:-1], 1)
        else:
            found.append(t)
    return [t.double() for t in found]


@pytest.mark.parametrize("index", range(REAL))
def test_every_candidate_errs_as_fp8_does(index):
    """Against the reference. Where values lie between two numbers of e4m3, some fall to the other
    one: of a sixteenth of the values, which differ by an eighth, that is 2 % or less. Attention and
    its product in 16 bits differ by what fp8 costs them.
    """
    torch.manual_seed(index)
    name, args = list(sizes.sit_fp8(cuda, 1))[index]
    args = OPS[name]._positional(args, {})
    expected = dequantised(OPS[name].reference(*args))
    backend = OPS[name].backends["triton"]
    found = backend.candidates(*args) if backend.candidates else None
    ways = {"": backend.run} if found is None else found.functions
    runs = list(ways.values())
    for run in runs[:1] if fake_cuda.PRESENT else runs:  # where values mean nothing, one will do
        results = dequantised(run(*args) if found is None else run(*found.cold))
        for got, wanted in zip(results, expected, strict=True):
            assert_close(
                got.view_as(wanted),
                wanted,
                0.06 if name == "attention_branch_fp8" else 0.02 + FP8_SUMS,
            )


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", FP8)
def test_a_captured_operation_replays_on_new_inputs(name, backend):
    args, new = (mapped(case(name, 1, torch.float16, seed=n), Tensor.cuda) for n in (22, 23))
    assert_replays(name, args, new, backend)


@pytest.mark.skipif(fake_cuda.PRESENT, reason="no values on the stand-in")
def test_what_is_no_number_stays_none_and_the_rest_saturates():
    x = torch.tensor([float("nan"), 1.0, -1e9, 1e9], device="cuda")
    q = quantize_static(x, torch.ones(1, device="cuda")).float().tolist()
    assert q[0] != q[0]
    assert q[1:] == [1, -448, 448]
