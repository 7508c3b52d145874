"""What records the work of a run on a device and does it again: CUDA graphs, their pool of memory, and what failures leave."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

RECORDING = threading.RLock()
"""Held by whoever records. One model at a time: to wait for the device, as each does before and after, breaks a recording that is
under way in another thread, in whatever mode."""


class Recorder(Protocol):
    """What can record the work of a run on a device."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Its result's buffer, and what does the work again. The buffer is filled by that, and not by the recording."""
        ...

    def turn(self) -> AbstractContextManager[object]:
        """Work queued inside waits for the work queued in earlier turns, on whatever stream and by whatever thread."""
        ...

    def settle(self) -> None:
        """Wait for the work of all turns."""
        ...

    def seconds(self, run: Callable[[], object]) -> float:
        """How long it takes on the device, from an idle one to an idle one."""
        ...

    def held(self) -> int:
        """Bytes of the device's memory that captures hold now."""
        ...

    def release(self) -> None:
        """Give back memory that nothing uses."""
        ...


class CudaRecorder:
    """CUDA graphs on one device. All captures share one pool, since replays take turns, and one stream, without which they would
    share the pool's name and none of its memory.

    torch ends a pool with the last graph in it, and takes its id for no other: a pool is made anew when no graph is alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # of that pool
        self._done: torch.cuda.Event | None = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        others = list(self._graphs)  # held here, lest the pool end meanwhile
        if self._pool is None or not others:
            self._pool = torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        cause, ended = None, True
        try:
            # torch.cuda.graph leaves its stream the current one where the capture can't be ended: this puts it back.
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream), _no_collection():
                _clear_workspaces()
                # Other threads may allocate meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        result = run()
                    except BaseException as error:
                        cause = error  # what the end of the capture may raise only follows from it
        except BaseException as error:
            cause, ended = cause or error, False
        _clear_workspaces()
        if cause is None:
            self._graphs.add(graph)
            return result, graph.replay
        if not ended:
            self._abandon(graph)
        try:
            raise cause
        finally:
            del cause, graph, others  # or they and this frame would hold each other

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Make whole what a capture leaves behind that could not be ended. The next one has a pool and a stream of its own."""
        index, pool = self.device.index, self._pool
        self._pool = self._stream = None
        self._graphs = weakref.WeakSet()
        graph.reset()
        name = "_cuda_endAllocateToPool"
        end = getattr(torch._C, name if hasattr(torch._C, name) else "_cuda_endAllocateCurrentStreamToPool")
        try:
            end(index, pool)
        except RuntimeError:  # not recording any more: torch did this itself, as 2.14 does
            return
        torch._C._cuda_releasePool(index, pool)
        _UNENDED.append(graph)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # the same numbers, and no longer those of a capture

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
        began = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def held(self) -> int:
        segments = torch.cuda.memory_snapshot()
        of_pools = (s for s in segments if s["device"] == self.device.index and tuple(s["segment_pool_id"]) != (0, 0))
        return sum(s["total_size"] for s in of_pools)

    def release(self) -> None:
        torch.cuda.empty_cache()


_UNENDED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture torch did not end, up to version 2.11: its allocator of pinned memory goes on asking them."""


def _clear_workspaces() -> None:
    """Give back cuBLAS's workspaces. A product takes one for each thread and stream and keeps it: one that was made in a capture
    would keep the pool from ending, and one that was made outside it would be given back, or used by others, beneath the graph."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python collects its garbage before and not inside: a capture must not be disturbed by the end of somebody's old graph."""
    gc.collect()  # it may hold memory, too
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
