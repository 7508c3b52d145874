"""The plain torch that operations are timed against computes what they do, in the dtype of its
arguments and in few launches.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from close import relative_error
from ops import CASES, FP8, case, examples, mapped, tensors
from paths import ROOT
from scaled_product import scaled_product_by_rows
from stopwatch import Stopwatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowturbo_kernels import OPS

sys.path.insert(0, str(ROOT / "bench"))

import correctness
import test_kernels
from plain_ops import PLAIN

VIEWS = {"view", "_unsafe_view", "permute", "transpose", "unsqueeze", "slice", "split", "expand"}
VIEWS |= {"select", "t", "unflatten", "detach", "alias", "_reshape_alias"}


def test_every_operation_has_a_plain_version():
    assert set(PLAIN) == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, index", CASES)
def test_it_errs_by_a_few_roundings_of_its_dtype(name, index, dtype):
    args = case(name, index, dtype)
    truths = tensors(OPS[name].reference(*mapped(args, Tensor.double)))
    for got, truth in zip(tensors(PLAIN[name](*args)), truths, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, truth) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", FP8)
def test_it_quantises_as_the_reference_does(name, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product_by_rows)
    for args in examples(name, torch.bfloat16):
        expected = tensors(OPS[name].reference(*args))
        for got, wanted in zip(tensors(PLAIN[name](*args)), expected, strict=True):
            assert got.dtype == wanted.dtype
            # it rounds to bfloat16 in between, after which some values fall to another of e4m3
            bound = 0.01 if name in ("quantize_rows", "linear_fp8") else 0.04
            assert relative_error(got.float(), wanted.float()) <= bound


class Launches(TorchDispatchMode):
    """The names of what is called but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.__name__.split(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("adaln_modulate", ["native_layer_norm", "add", "addcmul"]),
        ("gated_residual_adaln", ["addcmul", "native_layer_norm", "add", "addcmul"]),
        ("group_norm_silu", ["native_group_norm", "silu"]),
        ("linear_gated_residual", ["addmm", "addcmul"]),
    ],
)
def test_eager_torch_is_timed_without_the_references_widening(name, expected):
    """Which doubles the launches and the bytes."""
    args = case(name, 0, torch.bfloat16)
    with Launches() as launches:
        test_kernels.provider("eager", name, 1)(*args)
    assert launches.names == expected


@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch_is_what_is_timed_and_compiled(name, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function))
    monkeypatch.setattr(test_kernels, "COMPILED_BATCHES", (1,))
    test_kernels.provider("compiled", name, 1)
    assert compiled == [test_kernels.provider("eager", name, 1)] == [PLAIN[name]]


@pytest.mark.parametrize("wrong", [0.0, 0.05, float("nan")])
def test_a_result_that_is_wrong_is_not_timed(wrong, monkeypatch):
    name = test_kernels.CASES[0]
    right = PLAIN[name]
    monkeypatch.setitem(PLAIN, name, lambda *args: right(*args) * (1 + wrong))
    monkeypatch.setattr(test_kernels, "ceilings", lambda device: {})
    monkeypatch.setattr(test_kernels, "floor", lambda *_: 0.0)
    benchmark = Stopwatch()
    if wrong:
        with pytest.raises(pytest.fail.Exception, match=r"^wrong: \S+% from the reference"):
            test_kernels.test_kernel(benchmark, 1, 1, 0, "eager")
    else:
        test_kernels.test_kernel(benchmark, 1, 1, 0, "eager")
        assert benchmark.extra_info["apart"]["results"] < correctness.RESULTS[torch.float32]
    assert benchmark.timed is not bool(wrong)
