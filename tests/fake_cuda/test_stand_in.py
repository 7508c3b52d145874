"""The stand-in itself: what CUDA forbids is reported, and what it allows is not."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

from flowturbo_kernels import OPS, _cuda, _triton, use_backend
from flowturbo_kernels.adaln import _AdaLN

THREAD = "thread_local"
RUNTIME = ctypes.CDLL(None)


def on_device(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device="cuda")


@contextmanager
def recording(mode: str = THREAD) -> Iterator[torch.cuda.Stream]:
    """A capture of a stream by the runtime itself: torch's own is another test's matter."""
    stream, graph = torch.cuda.Stream(), ctypes.c_void_p()
    handle = ctypes.c_void_p(stream.cuda_stream)
    with torch.cuda.stream(stream):
        assert RUNTIME.cudaStreamBeginCapture(handle, ["global", THREAD].index(mode)) == 0
        try:
            yield stream
        finally:
            RUNTIME.cudaStreamEndCapture(handle, ctypes.byref(graph))
            RUNTIME.cudaGetLastError()


def reported(do: Callable[[], object], mode: str = THREAD) -> str:
    """What is reported of doing it while this thread captures."""
    with recording(mode), suppress(RuntimeError):
        do()
    return "\n".join(fake_cuda.violations())


def in_a_thread(do: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        def quietly() -> None:
            with suppress(RuntimeError):
                do()

        thread = threading.Thread(target=quietly)
        thread.start()
        thread.join()

    return run


def test_copies_from_pinned_memory_are_nodes():
    host = torch.ones(4).pin_memory()
    assert reported(lambda: copied_from(host)) == ""


def test_kernels_and_copies_on_the_device_are_nodes():
    x = on_device(64)
    with recording():
        (x + 1).copy_(x)
    assert len(fake_cuda.captured()) == 2
    assert fake_cuda.violations() == []


FORBIDDEN = {
    "cudaDeviceSynchronize": torch.cuda.synchronize,
    "waited for by the host": lambda: torch.cuda.current_stream().synchronize(),
    "queried": lambda: torch.cuda.current_stream().query(),
    "pageable memory": lambda: copied_from(torch.ones(4)),
    "is launched on another stream": lambda: launched_elsewhere(),
    "not joined": lambda: forked(),
    "recorded outside it": lambda: torch.cuda.current_stream().wait_event(EARLIER),
}
EARLIER = torch.cuda.Event()


def copied_from(host: torch.Tensor) -> None:
    """By the runtime: torch refuses it before."""
    to, at, stream = (
        on_device(4),
        ctypes.c_void_p(host.data_ptr()),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    RUNTIME.cudaMemcpyAsync(ctypes.c_void_p(to.data_ptr()), at, ctypes.c_size_t(16), 1, stream)
    RUNTIME.cudaGetLastError()


def launched_elsewhere() -> None:
    x = on_device(4)
    with torch.cuda.stream(torch.cuda.Stream()):
        x.add_(1)


def forked() -> None:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        on_device(4).add_(1)


@pytest.mark.parametrize("said", FORBIDDEN)
def test_what_a_capture_forbids_is_reported(said):
    EARLIER.record()
    assert said in reported(FORBIDDEN[said])


def test_a_fork_that_is_joined_is_fine():
    def both() -> None:
        forked_and_joined = torch.cuda.Stream()
        forked_and_joined.wait_stream(torch.cuda.current_stream())
        x = on_device(4)
        with torch.cuda.stream(forked_and_joined):
            x.add_(1)
        torch.cuda.current_stream().wait_stream(forked_and_joined)

    assert reported(both) == ""


@pytest.mark.parametrize("mode, breaks", [("global", True), (THREAD, False)])
def test_another_threads_allocation_breaks_a_global_capture_alone(mode, breaks):
    torch.cuda.empty_cache()
    said = reported(in_a_thread(lambda: torch.empty(1 << 28, device="cuda")), mode)
    assert ("cudaMalloc, by another thread" in said) == breaks


def test_another_threads_synchronisation_of_the_device_breaks_any_capture():
    assert "cudaDeviceSynchronize of the device" in reported(in_a_thread(torch.cuda.synchronize))


def test_memory_ends_where_the_device_does():
    fake_cuda.set_memory(1024)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    finally:
        fake_cuda.set_memory(None)
    assert torch.empty(2 << 30, dtype=torch.uint8, device="cuda").numel() == 2 << 30


@pytest.mark.parametrize("grid, threads, shared, said", [
    ((1, 65536), 32, 0, "grid y 65536"),
    ((1,), 2048, 0, "threads a block 2048"),
    ((1,), 32, 1 << 20, "dynamic shared memory 1048576"),
    ((0,), 32, 0, "empty grid"),
])  # fmt: skip
def test_launch_limits_are_the_devices(grid, threads, shared, said):
    """csrc's kernels by CuPy's driver calls, or the extension's by the runtime."""
    with pytest.raises(Exception, match=r"(?i)invalid"):
        _cuda.launch("flowturbo::adaln<float,4,3,false>", grid, threads, shared, _AdaLN())
    [violation] = fake_cuda.violations()
    assert said in violation


def test_csrc_is_launched_on_the_current_stream_also_by_a_threads_first_call():
    x, row = on_device(1, 2, 8), on_device(1, 8)

    def run() -> None:
        with use_backend("cuda"):
            OPS["adaln_modulate"](x, row, row)

    run()
    fake_cuda.launches()
    in_a_thread(run)()
    assert [name for name in fake_cuda.launches() if "flowturbo::adaln" in name]
    side = torch.cuda.Stream()
    with recording() as stream:
        assert stream != side
        run()
    assert ["flowturbo::adaln" in name for name in fake_cuda.captured()] == [True]


def test_code_of_another_architecture_is_not_loaded():
    driver = pytest.importorskip("cupy_backends.cuda.api.driver")
    from flowturbo_kernels import _nvrtc

    major, _ = torch.cuda.get_device_capability()
    _, code = _nvrtc.compiled(
        "flowturbo::adaln<float,4,3,false>", (12, 0) if major == 9 else (9, 0), _nvrtc.options()
    )
    with pytest.raises(driver.CUDADriverError):
        driver.moduleLoadData(code)
    [violation] = fake_cuda.violations()
    assert "is loaded on a device of sm_" in violation


newer = pytest.mark.skipif(torch.cuda.get_device_capability() < (9, 0), reason="from sm_90 on")


@newer
def test_a_kernel_that_does_not_wait_must_not_be_launched_while_others_run():
    _triton._one.jit[(1,)](on_device(1), launch_pdl=False)
    assert fake_cuda.violations() == []
    with pytest.raises(Exception, match=r"(?i)invalid"):
        _triton._one.jit[(1,)](on_device(1), launch_pdl=True)
    [violation] = fake_cuda.violations()
    assert "_one can't be launched: it may start before" in violation


@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_are_launched_while_others_run_where_the_device_and_the_user_allow_it(
    backend, setting, monkeypatch
):
    monkeypatch.setenv("FLOWTURBO_PDL", setting)
    row, latents = on_device(1, 64), on_device(1, 8, 8, 8)
    image = latents.contiguous(memory_format=torch.channels_last)
    fake_cuda.launches()
    fake_cuda.dependents()
    with use_backend(backend):
        OPS["adaln_modulate"](on_device(1, 2, 64), row, row)
        OPS["velocity_update"](latents, [latents], [0.5])
        OPS["guided_update"](latents, latents, None, 1, 0.5)
        OPS["group_norm_silu"](image, row[0, :8].clone(), row[0, :8].clone(), 2)
    launched = [n for n in fake_cuda.launches() if "flowturbo::" in n or "_kernel" in n[-8:]]
    on = setting == "1" and torch.cuda.get_device_capability() >= (9, 0)
    assert len(launched) >= 5
    assert fake_cuda.dependents() == (launched if on else [])
