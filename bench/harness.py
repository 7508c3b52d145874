"""Timing: on CUDA replays of a captured graph over rotating inputs, so that neither launches nor the cache are what is measured."""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

L2_BYTES = 128 << 20
"""Inputs rotate over at least so many bytes: more than twice the largest second-level cache (60 MB on an H200, 50 on an H100)."""


@functools.cache
def stream(device: int) -> torch.cuda.Stream:
    """The one stream of a device on which all is measured: every other one would leave a workspace of cuBLAS, 33 MiB on Hopper."""
    return torch.cuda.Stream(device)


def collect() -> None:
    """Give the device back what nothing uses any more, so that a peak of memory counted from now on is of what comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def rotated(arguments: tuple[Any, ...], bytes_a_call: int, device: str) -> list[tuple[Any, ...]]:
    """The arguments and as many copies, of the same strides, that together with the results they are larger than the cache."""
    copies = 1 if device == "cpu" else -(-L2_BYTES // max(1, bytes_a_call))
    return [arguments, *(copy.deepcopy(arguments) for _ in range(copies - 1))]


class Replays:
    """Calls of one function over several argument tuples as one CUDA graph; run() replays it and waits. On the CPU: plain calls."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], device: str) -> None:
        self.calls = max(len(arguments), 8 if device == "cuda" else 1)
        self._rounds = [arguments[i % len(arguments)] for i in range(self.calls)]
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            with torch.cuda.stream(stream(torch.cuda.current_device())):
                for args in arguments[:2]:
                    function(*args)  # compiles and chooses, which a capture may not
            torch.cuda.synchronize()
            self._graph, self._kept = captured(lambda: [function(*args) for args in self._rounds])
        else:
            function(*arguments[0])

    def run(self) -> None:
        if self._graph is None:
            for args in self._rounds:
                self._function(*args)
        else:
            self._graph.replay()
            torch.cuda.synchronize()


def captured(body: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The body's work as a graph, and its result. What the body raises is raised, and later captures are as if it had not been."""
    device = torch.cuda.current_device()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    collect()
    with torch.cuda.stream(stream(device)):
        # Other threads, such as Inductor's, may allocate meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = body()
        except BaseException:
            _abandon(graph, pool, device)
            raise
        try:
            graph.capture_end()
        except BaseException:
            _stop_recording(pool, device)
            raise
    return graph, result


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: int) -> None:
    try:
        graph.capture_end()
    except RuntimeError:  # the body did what a capture forbids, and says so itself
        _stop_recording(pool, device)


def _stop_recording(pool: Any, device: int) -> None:
    """torch leaves memory going to the pool, and the stream to a capture, where CUDA could not end one."""
    torch._C._cuda_endAllocateToPool(device, pool)
    stream.cache_clear()


def seconds(function: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median seconds of one call."""
    replays = Replays(function, [()], device)
    replays.run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        replays.run()
        times.append((time.perf_counter() - start) / replays.calls)
    return statistics.median(times)
