"""Timing: on CUDA replays of a captured graph over rotating inputs, so that neither launches nor
the cache are what is measured.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowturbo_kernels.graphs import GraphPool

L2_BYTES = 128 << 20
"""Inputs rotate over at least so many bytes: more than twice the largest second-level cache (60 MB
on an H200, 50 on an H100).
"""


@functools.cache
def graphs() -> GraphPool:
    """What records all that is measured, on one stream: every other one would leave a workspace of
    cuBLAS, 33 MiB on Hopper.
    """
    return GraphPool(torch.device("cuda", torch.cuda.current_device()))


def collect() -> None:
    """Give the device back what nothing uses any more, so that a peak of memory counted from now on
    is of what comes.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def rotated(arguments: tuple[Any, ...], bytes_a_call: int, device: str) -> list[tuple[Any, ...]]:
    """The arguments and as many copies, of the same strides, that together with the results they
    are larger than the cache.
    """
    copies = 1 if device == "cpu" else -(-L2_BYTES // max(1, bytes_a_call))
    return [arguments, *(copy.deepcopy(arguments) for _ in range(copies - 1))]


class Replays:
    """Calls of one function over several argument tuples as one CUDA graph; run() replays it and
    waits. On the CPU: plain calls.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], device: str
    ) -> None:
        self.calls = max(len(arguments), 8 if device == "cuda" else 1)
        self._rounds = [arguments[i % len(arguments)] for i in range(self.calls)]
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            with torch.cuda.stream(graphs().stream):
                for args in arguments[:2]:
                    function(*args)  # compiles and chooses, which a capture may not
            collect()
            self._kept, self._graph = graphs().record(
                lambda: [function(*args) for args in self._rounds]
            )
        else:
            function(*arguments[0])

    def run(self) -> None:
        if self._graph is None:
            for args in self._rounds:
                self._function(*args)
        else:
            self._graph.replay()
            torch.cuda.synchronize()


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
