"""The choice by measurement on the stand-in for a CUDA device: which candidates there are, and that
measuring disturbs nobody.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

from flowturbo_kernels import OPS, _measure, _tune, quantize_rows, use_backend
from flowturbo_kernels._measure import Timing
from flowturbo_kernels.graphs import GraphPool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As another process begins."""
    _tune._in_memory.clear()
    _tune._on_disk.clear()


def product(backend: str, K: int = 1152, N: int = 1152) -> str:
    """What is taken for a product on that backend."""
    args = [
        torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((2, 256, K), (N, K), (N,))
    ]
    with use_backend(backend), torch.no_grad():
        OPS["linear"](*args)
        return OPS["linear"].why(*args)[0]


@pytest.fixture
def torchs_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _tune.timing

    def timing(run, sets, device):
        fake_cuda.launches()
        original(run, sets, device)
        return Timing(1.0 if any("cublas" in name for name in fake_cuda.launches()) else 2.0, True)

    monkeypatch.setattr(_tune, "timing", timing)


def test_torchs_is_taken_in_every_operation_that_has_it(folder, torchs_is_fastest):
    x, weight, bias, gate = (
        torch.zeros(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((2, 256, 128), (128, 128), (128,), (2, 128))
    )
    quantised = quantize_rows(weight)
    x8, row_scale = quantize_rows(x.flatten(0, 1))
    asked = (
        ("linear", (x, weight, bias, None), "torch"),
        ("linear", (x, weight, bias, "gelu_tanh"), "cublaslt gelu"),
        ("linear_gated_residual", (x, weight, bias, x, gate), "torch"),
        ("linear_fp8", (x, *quantised, bias, None), "torch"),
        (
            "linear_quantized",
            (x8, row_scale, *quantised, bias, "gelu_tanh", row_scale[:1]),
            "torch",
        ),
        ("linear_quantized", (x8, None, *quantised, bias, None, None), "torch"),
    )
    for name, args, chosen in asked * 2:
        for backend in ("auto", "triton", "auto"):
            with use_backend(backend), torch.no_grad():
                OPS[name](*args)
                assert (OPS[name].why(*args)[0] == chosen) == (backend == "auto"), name


@pytest.mark.parametrize("order", [("auto", "triton", "auto"), ("triton", "auto", "triton")])
def test_a_backend_that_was_asked_for_by_name_does_not_decide_for_auto(
    folder, torchs_is_fastest, order
):
    for backend in order:
        assert (product(backend) == "torch") == (backend == "auto")
    forget()
    for backend in order:
        assert (product(backend) == "torch") == (backend == "auto")
    chosen = [
        c["fastest"]
        for file in folder.glob("*.json")
        for c in json.loads(file.read_text())["choices"].values()
    ]
    assert chosen.count("torch") == 1


def test_the_file_tells_the_device_and_versions(folder, torchs_is_fastest):
    product("auto")
    [file] = folder.glob("*.json")
    of = json.loads(file.read_text())["of"]
    assert of["device"] == torch.cuda.get_device_name()
    assert of["multi_processor_count"] == torch.cuda.get_device_properties(0).multi_processor_count
    assert of["torch"] == torch.__version__


OTHERS_WORK = {
    "waits for the device": torch.cuda.synchronize,
    "draws random numbers": lambda: torch.randn(8, device="cuda"),
    "allocates and frees": lambda: (torch.empty(1 << 26, device="cuda"), torch.cuda.empty_cache()),
    "reads a value": lambda: torch.ones(3, device="cuda").sum().item(),
    "computes": lambda: torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda"),
}


@pytest.mark.parametrize("work", OTHERS_WORK.values(), ids=OTHERS_WORK)
def test_another_thread_works_on_while_a_call_is_measured(folder, work):
    x = torch.zeros(64, 64, device="cuda")
    with ThreadPoolExecutor(1) as another:

        def interrupted(weight: torch.Tensor) -> torch.Tensor:
            another.submit(work).result()
            return x @ weight

        took = _measure.timing(interrupted, [(x,)], x.device)
    assert took.seconds < float("inf")
    assert fake_cuda.violations() == []


def test_measuring_beside_a_thread_that_captures(folder):
    taken: list[str] = []
    x = torch.zeros(4, device="cuda")

    def body() -> torch.Tensor:
        thread = threading.Thread(target=lambda: taken.append(product("auto")))
        thread.start()
        thread.join()
        return x + 1

    GraphPool(torch.device("cuda", 0)).record(body)
    assert len(taken) == 1
    assert fake_cuda.violations() == []
    assert len(fake_cuda.captured()) == 1


def test_measuring_leaves_torch_as_it_was(folder):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        numbers = torch.cuda.get_rng_state()
        product("auto")
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.get_rng_state().equal(numbers)


def test_measuring_keeps_no_memory(folder):
    def held() -> int:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    product("auto", K=128, N=128)  # brings what torch keeps for good
    before = held()
    torch.cuda.reset_peak_memory_stats()
    product("auto")
    assert torch.cuda.max_memory_allocated() > 2 * torch.cuda.get_device_properties(0).L2_cache_size
    assert held() <= before


def test_weights_rotate_over_several_times_the_cache(monkeypatch):
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    weight, bias = (torch.zeros(n, device="cuda", dtype=torch.uint8) for n in (cache // 8, 1024))
    with _measure.rotating((weight, bias), weight.device) as (sets, enough):
        assert enough
        assert sets[0] == (weight, bias)
        assert sum(t.nbytes for s in sets for t in s) >= 3 * cache
        assert len({t.data_ptr() for s in sets for t in s}) == 2 * len(sets)
    with _measure.rotating((bias,), weight.device) as (sets, enough):
        assert (len(sets), enough) == (_measure._MOST_COPIES, True)
    with _measure.rotating((), weight.device) as (sets, enough):
        assert (sets, enough) == ([()], True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (cache, cache))
    with _measure.rotating((weight, bias), weight.device) as (sets, enough):
        assert sum(t.nbytes for s in sets[1:] for t in s) <= cache // 4
        assert (len(sets), enough) == (2, False)


@pytest.mark.parametrize("free", [None, 1 << 40])
def test_where_memory_is_short_fewer_weights_rotate_and_the_choice_is_not_kept(
    folder, torchs_is_fastest, monkeypatch, free
):
    """None: as much as the device says; else another process was quicker than this one."""
    product("auto", N=4608)
    forget()
    for file in folder.glob("*.json"):
        file.unlink()
    torch.cuda.empty_cache()
    if free is not None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    try:
        fake_cuda.set_memory(70 + torch.cuda.memory_reserved() // 2**20)
        assert product("auto", N=4608) == "torch"
        assert list(folder.glob("*.json")) == []
    finally:
        fake_cuda.set_memory(None)
    forget()
    product("auto", N=4608)
    assert len(list(folder.glob("*.json"))) == 1


def test_a_candidate_that_lacks_memory_leaves_nothing_on_disk(folder):
    x = torch.zeros(64, 64, device="cuda")

    def hungry(weight: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    candidates = _tune.Candidates(
        ("it",), {"hungry": hungry, "product": lambda weight: x @ weight}, x.device, (x,)
    )
    assert _tune.fastest(candidates) == "product"
    assert list(folder.glob("*.json")) == []
