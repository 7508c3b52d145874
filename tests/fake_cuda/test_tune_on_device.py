"""The choice by measurement on the stand-in for a CUDA device: which candidates there are, and that measuring disturbs nobody."""

from __future__ import annotations

import json
import statistics
import threading

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

from flowturbo_kernels import OPS, _graphs, _tune, use_backend


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    _tune._known.clear()
    yield tmp_path
    _tune._known.clear()


def product(backend: str, K: int = 1152, N: int = 3456) -> list[str]:
    """What is taken for a product of SiT-XL/2 on that backend."""
    x, weight, bias = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((2, 256, K), (N, K), (N,)))
    with use_backend(backend), torch.no_grad(), _tune.choices() as seen:
        OPS["linear"](x, weight, bias)
    return seen


def test_a_backend_that_was_asked_for_by_name_does_not_decide_for_auto(folder, monkeypatch):
    """cuBLAS is fastest here; who asks for Triton first measures tiles alone."""
    original = _tune.timings

    def timings(run, rotating, device):
        fake_cuda.launches()
        measured = original(run, rotating, device)
        torchs = any("cublas" in name for name in fake_cuda.launches())
        return [1.0 if torchs else 2.0] * len(measured)

    monkeypatch.setattr(_tune, "timings", timings)
    for order in (("auto", "triton", "auto"), ("triton", "auto", "triton")):
        taken = [product(backend) for backend in order]
        assert [t == ["torch"] for t in taken] == [backend == "auto" for backend in order]
        for file in folder.glob("*.json"):
            file.unlink()
        _tune._known.clear()


def test_the_operations_of_a_model_leave_torchs_product_in_the_cache(folder):
    product("triton")
    product("auto")
    chosen = [c for file in folder.glob("*.json") for c in json.loads(file.read_text())["fastest"].values()]
    assert "torch" in chosen


def test_the_file_tells_device_clocks_and_versions(folder):
    product("auto")
    [file] = folder.glob("*.json")
    of = json.loads(file.read_text())["of"]
    assert of["device"] == torch.cuda.get_device_name()
    assert len(of["clocks"].split(", ")) == 3
    assert of["torch"] == torch.__version__
    assert "none" not in of.values()


def test_measuring_beside_a_thread_that_allocates_and_frees(folder):
    stop = threading.Event()
    errors: list[BaseException] = []

    def allocate() -> None:
        try:
            while not stop.is_set():
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


def test_measuring_waits_for_another_threads_recording(folder):
    """It would wait for the device, which breaks a capture that is under way."""
    taken: list[list[str]] = []
    with _graphs.RECORDING:
        thread = threading.Thread(target=lambda: taken.append(product("auto")))
        thread.start()
        thread.join(0.2)
        assert taken == []
    thread.join()
    assert taken == [["torch"]]


def test_measuring_keeps_no_memory(folder):
    torch.cuda.empty_cache()
    product("auto", K=128, N=128)  # brings torch's own workspaces
    before = torch.cuda.memory_reserved()
    for N in (256, 512, 1024):
        product("auto", N=N)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_candidate_that_fails_inside_its_capture_leaves_torch_whole(folder):
    x = torch.zeros(64, 64, device="cuda")

    def waits(weight: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return x @ weight

    assert _tune.fastest("it", {"waits": waits, "product": lambda weight: x @ weight}, x.device, (x,)) == "product"
    assert any("waited for by the host" in said for said in fake_cuda.violations())
    assert list(folder.glob("*.json")) == []
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert product("auto") == ["torch"]
    assert torch.randn(4, device="cuda").shape == (4,)


def test_timings_are_of_every_round_and_of_a_capture_of_its_own(folder):
    weight = torch.zeros(64, 64, device="cuda")
    rotating = [(weight.clone(),) for _ in range(30)]
    times = _tune.timings(lambda w: w + 1, rotating, weight.device)
    assert len(times) == _tune._ROUNDS
    assert statistics.median(times) > 0
    assert len(fake_cuda.captured()) == 30
