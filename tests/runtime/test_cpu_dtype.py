"""Which dtype a model gets, and what is said of bfloat16 on this CPU."""

import warnings

import pytest
import torch

import flowturbo as ft
from flowturbo.runtime import cpu_dtype
from flowturbo.runtime.cpu_dtype import (
    bfloat16_advice,
    choose_dtype,
    instructions_in,
    product_ratio,
    warn_if_slow,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "cpuinfo, names",
    [
        ("model name\t: A\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n", 2),
        ("flags\t\t: fpu avx512f avx512_bf16\n", 1),
        ("Features\t: fp asimd i8mm bf16 sve\n", 1),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_tile\n", 0),
        ("model name\t: bf16\n", 0),
        ("", 0),
    ],
)
def test_instructions_are_read_from_the_list_of_the_cpu(cpuinfo, names):
    assert len(instructions_in(cpuinfo)) == names


def test_a_list_that_cannot_be_read_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_dtype, "multiplies_bfloat16", lambda: True)
    for path in (tmp_path, tmp_path / "absent"):  # a folder can be read by nobody
        monkeypatch.setattr(cpu_dtype, "_CPUINFO", path)
        cpu_dtype.bfloat16_instructions.cache_clear()
        assert isinstance(cpu_dtype.bfloat16_instructions(), tuple)
    cpu_dtype.bfloat16_instructions.cache_clear()


@pytest.fixture(params=[("amx_bf16",), ()], ids=["amx", "none"])
def instructions(request, monkeypatch):
    monkeypatch.setattr(cpu_dtype, "bfloat16_instructions", lambda: request.param)
    warn_if_slow.cache_clear()
    yield request.param
    warn_if_slow.cache_clear()


def test_the_dtype_of_a_model(instructions):
    narrow, wide = torch.bfloat16, torch.float32
    assert choose_dtype("auto", CPU) == (narrow if instructions else wide)
    assert choose_dtype(None, CPU) == wide
    assert choose_dtype(None, CUDA) == choose_dtype("auto", CUDA) == narrow
    assert choose_dtype(torch.float16, CPU) == torch.float16
    for wrong in (torch.int8, "float32"):
        with pytest.raises(TypeError, match="dtype must be a floating point type or 'auto', got"):
            choose_dtype(wrong, CPU)
    assert ft.load("digits", device="cpu", dtype="auto").dtype == choose_dtype("auto", CPU)
    assert ft.load("digits", device="cpu").dtype == wide


def test_slow_bfloat16_is_warned_of_once(instructions):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ft.load("digits", device="cpu")
        ft.load("digits", device="cpu", dtype="auto")
        assert not caught
        for _ in range(2):
            ft.load("digits", device="cpu", dtype=torch.bfloat16)
    assert [str(w.message)[:39] for w in caught] == (
        [] if instructions else ["this CPU has no bfloat16 instructions: "]
    )
    assert all(w.filename == __file__ for w in caught)


def test_the_advice_is_what_auto_does(instructions, monkeypatch):
    monkeypatch.setattr(cpu_dtype, "product_ratio", lambda: 0.345)
    said = bfloat16_advice()
    assert said.startswith("worth it" if instructions else "not worth it")
    assert "0.34 of float32's time" in said or "0.35 of float32's time" in said
    assert all(name in said for name in instructions)


def test_a_ratio_is_measured():
    assert 0 < product_ratio(0.0) < 1000
