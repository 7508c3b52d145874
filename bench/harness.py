"""Timing: on CUDA replays of a captured graph over rotating inputs, so that neither launches nor
the cache are what is measured.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from machine import STAND_IN

from flowturbo_kernels.graphs import GraphPool

L2_BYTES = 128 << 20
"""Inputs rotate over at least so many bytes: more than twice the largest second-level cache (60 MB
on an H200, 50 on an H100).
"""

LEAST_SECONDS = 3e-3
"""Of one replay: starting it and waiting for its end take 10 to 20 us, which are then below 1 %."""
MOST_CALLS = 4096
"""In one replay: of launches as short as these no more is known."""


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
    """Calls of one function over several argument tuples as one CUDA graph, of so many calls that
    what a replay costs beside them is below 1 %; run() replays it and waits. On the CPU: plain
    calls.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], device: str
    ) -> None:
        self.calls = max(len(arguments), 8 if device == "cuda" else 1)
        self._function, self._arguments = function, arguments
        self._graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            with torch.cuda.stream(graphs().stream):
                for args in arguments[:2]:
                    function(*args)  # compiles and chooses, which a capture may not
            self._record()
            while (wanted := self._calls_wanted()) > self.calls:
                self.calls = wanted
                self._record()
        else:
            function(*arguments[0])

    def _record(self) -> None:
        self._graph = self._kept = None  # its memory serves the next
        collect()
        self._kept, self._graph = graphs().record(self._call_all)

    def _call_all(self) -> deque[Any]:
        """The newest results, as many as there are arguments: all would outgrow the device's
        memory, and fewer would be written to its cache.
        """
        results: deque[Any] = deque(maxlen=len(self._arguments))
        for i in range(self.calls):
            results.append(self._function(*self._arguments[i % len(self._arguments)]))
        return results

    def _calls_wanted(self) -> int:
        if STAND_IN:  # whose times mean nothing
            return self.calls
        self.run()
        took = min(_seconds_of(self.run) for _ in range(3))
        if took >= LEAST_SECONDS:
            return self.calls
        return min(MOST_CALLS, math.ceil(1.1 * self.calls * LEAST_SECONDS / took))

    def run(self) -> None:
        if self._graph is None:
            self._call_all()
        else:
            self._graph.replay()
            torch.cuda.synchronize()


def _seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def seconds(function: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median seconds of one call."""
    replays = Replays(function, [()], device)
    replays.run()
    return statistics.median(_seconds_of(replays.run) / replays.calls for _ in range(repeats))
