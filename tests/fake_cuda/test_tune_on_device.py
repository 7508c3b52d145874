"""The choice by measurement on the stand-in for a CUDA device: which candidates there are, and that measuring disturbs nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

from flowturbo_kernels import OPS, _tune, use_backend
from flowturbo_kernels._graphs import GraphPool
from flowturbo_kernels._measure import Timing


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As another process begins."""
    _tune._chosen.clear()
    _tune._read.clear()


def product(backend: str, K: int = 1152, N: int = 1152) -> str:
    """What is taken for a product on that backend."""
    args = [torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((2, 256, K), (N, K), (N,))]
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


@pytest.mark.parametrize("order", [("auto", "triton", "auto"), ("triton", "auto", "triton")])
def test_a_backend_that_was_asked_for_by_name_does_not_decide_for_auto(folder, torchs_is_fastest, order):
    for backend in order:
        assert (product(backend) == "torch") == (backend == "auto")
    forget()
    for backend in order:
        assert (product(backend) == "torch") == (backend == "auto")
    chosen = [c["fastest"] for file in folder.glob("*.json") for c in json.loads(file.read_text())["choices"].values()]
    assert chosen.count("torch") == 1


def test_the_file_tells_the_device_and_versions(folder, torchs_is_fastest):
    product("auto")
    [file] = folder.glob("*.json")
    of = json.loads(file.read_text())["of"]
    assert of["device"] == torch.cuda.get_device_name()
    assert of["multi_processor_count"] == torch.cuda.get_device_properties(0).multi_processor_count
    assert of["torch"] == torch.__version__


def test_measuring_beside_a_thread_that_allocates_and_frees(folder):
    stop = threading.Event()
    errors: list[BaseException] = []

    def allocate() -> None:
        try:
            while not stop.wait(0.01):
                torch.empty(1 << 26, device="cuda")
                torch.cuda.empty_cache()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        product("auto")
    finally:
        stop.set()
        thread.join()
    assert errors == []
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


def test_measuring_keeps_no_memory(folder):
    def held() -> int:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    product("auto", K=128, N=128)  # brings what torch keeps for good
    before = held()
    product("auto", N=256)
    assert held() <= before


def test_a_candidate_that_lacks_memory_leaves_nothing_on_disk(folder):
    x = torch.zeros(64, 64, device="cuda")

    def hungry(weight: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ways = _tune.Ways(("it",), {"hungry": hungry, "product": lambda weight: x @ weight}, x.device, (x,))
    assert _tune.fastest(ways) == "product"
    assert list(folder.glob("*.json")) == []
