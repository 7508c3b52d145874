"""Captures on the stand-in for a CUDA device: several models and threads at once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captures_on_device import (
    MIB,
    WORKSPACE,
    in_pools,
    kept,
    matrix,
    model_on_cuda,
    product,
    sampled,
    strict,
)
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key
from flowturbo.runtime.recorder import CudaRecorder
from flowturbo_kernels import _streams
from flowturbo_kernels.graphs import GraphPool

fake_cuda = pytest.importorskip("fake_cuda")
if not getattr(fake_cuda, "PRESENT", False):
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

__all__ = ["strict"]


def test_captures_have_a_workspace_each_even_on_one_stream():
    first, second = Captures(), Captures()
    for captures in (first, second):
        captures.recorder = CudaRecorder(torch.device("cuda", 0))
    first.recorder._pool._stream = second.recorder._pool._stream = torch.cuda.Stream()
    memory = [
        captures.precapture(Key("it", 64), product, matrix(), []).memory
        for captures in (first, second)
    ]
    assert memory[0] == memory[1] > WORKSPACE


def test_a_workspace_from_outside_is_not_taken_into_a_capture():
    captures = Captures()
    captures.recorder = CudaRecorder(torch.device("cuda", 0))
    with torch.cuda.stream(captures.recorder._pool.stream):
        product(torch.ones(64, 64, device="cuda"))
    assert captures.precapture(Key("it", 64), product, matrix(), []).memory > WORKSPACE


def test_a_workspace_of_a_capture_is_not_taken_outside_it():
    captures = Captures()
    captures.precapture(Key("it", 64), product, matrix(), [])
    torch.cuda.synchronize()
    before, pools = torch.cuda.memory_reserved(), in_pools()
    with torch.cuda.stream(captures.recorder._pool.stream):
        product(torch.ones(64, 64, device="cuda"))
    assert in_pools() == pools
    assert torch.cuda.memory_reserved() > before + WORKSPACE


def test_two_models_in_two_threads():
    start = threading.Barrier(2)

    def one(plan: str) -> list[str]:
        model = model_on_cuda(limit=1)
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                sampled(model, plan)
                sampled(model, "E1")
            sampled(model, plan)
        return kept(model)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, ["H1P1R1", "E2"])) == [["H1P1R1"], ["E2"]]


def test_threads_share_one_model():
    model = model_on_cuda(limit=2)
    plans = ["H1P1R1", "E2", "E1"]

    def one(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            sampled(model, plans[number % 3], times=4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(12)))
    assert len(kept(model)) == 2


def beside_a_capture(work: Callable[[], object]) -> tuple[Captures, list[object]]:
    """Captures a body that waits inside its capture for what another thread does -> captures, and
    what that came to.
    """
    captures, begun, done = Captures(), threading.Event(), threading.Event()

    def other() -> object:
        begun.wait()
        try:
            return work()
        finally:
            done.set()

    def body(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            begun.set()
            done.wait()
        return product(x)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        try:
            captures.precapture(Key("it", 64), body, matrix(), [])
        finally:
            begun.set()
    return captures, [result.result()]


def test_a_thread_that_allocates_and_computes_during_a_capture():
    alone = Captures().precapture(Key("it", 64), product, matrix(), []).memory

    def work() -> int:
        big = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
        small = product(torch.ones(64, 64, device="cuda")) + torch.empty(16).pin_memory().cuda()[0]
        del big, small
        torch.cuda.empty_cache()
        return in_pools()

    captures, _ = beside_a_capture(work)
    assert captures.report()[0].memory == alone
    captures.run(Key("it", 64), product, matrix(), [])


def test_a_thread_that_makes_streams_during_a_capture():
    """torch hands out 32 streams in turn: none of them may be the one that is captured."""
    launched: list[str] = []

    def work() -> list[bool]:
        streams = [torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(40)]
        x = torch.ones(4, device="cuda")
        fake_cuda.launches()
        states = []
        for stream in streams:
            with torch.cuda.stream(stream):
                states.append(torch.cuda.is_current_stream_capturing())
                torch.sin(x)
        launched.extend(fake_cuda.launches())
        return states

    captures, [states] = beside_a_capture(work)
    assert states == [False] * 80
    assert sum("sin" in name for name in launched) == 80
    assert not any("sin" in name for name in fake_cuda.captured())
    captures.run(Key("it", 64), product, matrix(), [])


def test_pools_alive_have_streams_of_their_own_and_those_gone_leave_theirs():
    device = torch.device("cuda", 0)
    pools = [GraphPool(device) for _ in range(40)]
    streams = {pool.stream.cuda_stream for pool in pools}
    assert len(streams) == 40
    assert not streams & {torch.cuda.Stream().cuda_stream for _ in range(40)}
    del pools
    assert GraphPool(device).stream.cuda_stream in streams


def test_a_stream_that_may_still_be_capturing_is_not_used_again():
    pool = GraphPool(torch.device("cuda", 0))
    stream = pool.stream
    with pytest.raises(RuntimeError):
        pool.record(torch.cuda.synchronize)
    fake_cuda.violations()
    assert pool.stream != stream
    del pool
    assert all(GraphPool(stream.device).stream != stream for _ in range(3))


def test_captures_work_where_no_library_can_be_called_directly(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(_streams.ctypes, "CDLL", refuse)
    monkeypatch.setattr(_streams, "_idle", {})
    _streams._clear_workspaces_of_stream.cache_clear()
    try:
        captures = Captures()
        assert captures.precapture(Key("it", 64), product, matrix(), []).memory > WORKSPACE
        assert not isinstance(captures.recorder._pool.stream, torch.cuda.ExternalStream)
        captures.clear()
        assert in_pools() == 0
    finally:
        _streams._clear_workspaces_of_stream.cache_clear()


def test_a_thread_whose_product_has_its_workspace_and_is_not_launched_yet():
    """The workspace stays the device's memory, whatever is captured meanwhile."""
    fetched, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            fetched.set()
            go_on.wait()

    x = torch.ones(64, 64, device="cuda")
    with ThreadPoolExecutor(1) as threads, fake_cuda.before_products(wait):
        result = threads.submit(lambda: product(torch.ones(64, 64, device="cuda")))
        try:
            fetched.wait()
            # nothing is allocated, lest it get the workspace's address
            GraphPool(torch.device("cuda", 0)).record(lambda: x.add_(1))
        finally:
            go_on.set()
        result.result()
    assert fake_cuda.violations() == []


def test_a_thread_that_gives_up_its_captures_and_collects_garbage_during_a_capture():
    model = model_on_cuda()
    sampled(model)
    cycle: list[object] = [ft.compile(model_on_cuda(), "E1")]
    cycle.append(cycle)
    del cycle

    def work() -> int:
        model.captures.clear()
        return gc.collect()

    captures, _ = beside_a_capture(work)
    captures.run(Key("it", 64), product, matrix(), [])
    assert captures.report()[0].hits == 1
