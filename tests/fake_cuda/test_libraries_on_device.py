"""A library's product among the candidates on the stand-in for a CUDA device: it is compiled before
a capture has it, whoever chose it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

from fake_libraries import Fakes

from flowturbo.runtime.cuda_graphs import Captures, Key
from flowturbo_kernels import _e4m3, _library, _quack, _tune, linear
from flowturbo_kernels._e4m3 import ones
from flowturbo_kernels._library import LibraryKernel
from flowturbo_kernels._measure import Timing


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    """A quack that is the fastest; its kernels are torch's, and no value means anything."""
    capturing = torch.cuda.is_current_stream_capturing
    fakes = Fakes(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    monkeypatch.setattr(_library, "relative_error", lambda got, expected: 0.0)
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))

    def timing(run, sets, device):
        run(*sets[0])
        return Timing(1.0 if isinstance(run, LibraryKernel) else 2.0, True)

    monkeypatch.setattr(_tune, "timing", timing)
    another_process(fakes)
    yield fakes
    another_process(fakes)


def another_process(fakes: Fakes) -> None:
    _tune._in_memory.clear()
    _tune._on_disk.clear()
    fakes.forget()


def test_a_choice_from_disk_is_compiled_by_the_run_before_the_capture(fakes):
    device = torch.device("cuda", 0)
    weight = torch.zeros(1152, 1152, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(1152, device=device, dtype=torch.bfloat16)
    inputs = {"x": torch.zeros(512, 1152, device=device, dtype=torch.bfloat16)}
    in_captures: list[bool] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        calls = len(fakes.log)
        y = linear(x, weight, bias)
        if torch.cuda.is_current_stream_capturing():
            in_captures.append(len(fakes.log) == calls + 1)
        return y

    with torch.no_grad():
        body(**inputs)  # measures
        assert linear.why(inputs["x"], weight, bias)[0].startswith("quack")
        another_process(fakes)
        Captures().precapture(Key("a", 1), body, inputs, [])
        another_process(fakes)
        captures = Captures()
        for _ in range(3):
            captures.run(Key("a", 1), body, inputs, [])
    assert in_captures == [True, True]
    assert len(_quack.LIBRARY.ready) == 1  # the chosen one alone
    assert fake_cuda.violations() == []


def test_scales_of_rows_that_have_none_are_made_once_and_not_in_a_capture(monkeypatch):
    device, made = torch.device("cuda", 0), []
    allocate = torch.ones
    monkeypatch.setattr(_e4m3, "_ones", {})
    monkeypatch.setattr(torch, "ones", lambda *a, **k: made.append(a) or allocate(*a, **k))

    def captured(count: int) -> int:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return ones(count, device).data_ptr()

    first = captured(40)  # memory of the graph, which is not kept
    assert _e4m3._ones == {}
    kept = ones(40, device)
    assert (kept.shape, kept.dtype, len(made)) == ((40,), torch.float32, 2)
    assert captured(40) == captured(33) == ones(64, device).data_ptr() == kept.data_ptr() != first
    assert len(made) == 2
    assert ones(0, device).shape == (0,)
