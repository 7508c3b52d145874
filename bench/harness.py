"""Timing: on CUDA replays of a captured graph over rotating inputs, so that neither launches nor the cache are what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

L2_BYTES = 256 << 20
"""Inputs rotate over at least so many bytes: several times the largest second-level cache (60 MB on an H200)."""


class Replays:
    """Calls of one function over several argument tuples as one CUDA graph; run() replays it and waits. On the CPU: plain calls."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], device: str) -> None:
        self.calls = max(len(arguments), 8 if device == "cuda" else 1)
        self._rounds = [arguments[i % len(arguments)] for i in range(self.calls)]
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for args in arguments[:2]:
                    function(*args)  # compiles and chooses, which a capture may not
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._kept = [function(*args) for args in self._rounds]
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
