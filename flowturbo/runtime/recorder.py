"""Recorders: they record the work of a run on a device and replay it. One uses CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from flowturbo_kernels.graphs import GraphPool


class Recorder(Protocol):
    """What Captures needs of a device."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Record a run -> (the buffer of its result, a function that replays it).

        The buffer is filled by each replay, not by the recording.
        """
        ...

    def turn(self) -> AbstractContextManager[object]:
        """A block whose work waits for the work of all earlier blocks.

        They may be on other streams and in other threads.
        """
        ...

    def settle(self) -> None:
        """Wait for the work of all turns."""
        ...

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one run; the device is synchronised before and after it."""
        ...

    def held(self) -> int:
        """Bytes of device memory that captures hold now."""
        ...

    def release(self) -> None:
        """Return unused memory to the device."""
        ...


class CudaRecorder:
    """CUDA graphs on one device that share a memory pool, so replays take turns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = GraphPool(device)
        self._done: torch.cuda.Event | None = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        result, graph = self._pool.record(run)
        return result, graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def settle(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def held(self) -> int:
        segments = torch.cuda.memory_snapshot()
        of_pools = (
            s
            for s in segments
            if s["device"] == self.device.index and tuple(s["segment_pool_id"]) != (0, 0)
        )
        return sum(s["total_size"] for s in of_pools)

    def release(self) -> None:
        torch.cuda.empty_cache()
