"""CUDA graphs: capture that disturbs no other thread, and cleanup after a capture that failed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ._streams import clear_workspaces, return_private_stream, take_private_stream

T = TypeVar("T")

RECORDING = threading.RLock()
"""Held during a capture and the synchronisations around it: synchronising the device breaks a
capture in another thread, in whatever mode.
"""


class GraphPool:
    """Records graphs of one device. All share one memory pool, so their replays must take turns,
    and one stream, since the blocks of a pool are reused only on the stream they were allocated on.

    torch frees a pool with the last graph in it and never takes its id again: record() makes a new
    pool when no graph is alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._return_stream: weakref.finalize[..., GraphPool] | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # of that pool

    @property
    def stream(self) -> torch.cuda.Stream:
        """The capture stream, which nobody else has; a new one after a failed capture."""
        if self._stream is None:
            self._stream = take_private_stream(self.device)
            self._return_stream = weakref.finalize(self, return_private_stream, self._stream)
        return self._stream

    def record(self, run: Callable[[], T]) -> tuple[T, torch.cuda.CUDAGraph]:
        """Capture run -> (its result, whose memory each replay fills, the graph). What run raises
        is raised.
        """
        graph = torch.cuda.CUDAGraph()
        others = list(self._graphs)  # keeps the pool alive meanwhile
        if self._pool is None or not others:
            self._pool = torch.cuda.graph_pool_handle()
        cause, ended = None, True
        try:
            with (
                RECORDING,
                torch.cuda.device(self.device),
                torch.cuda.stream(self.stream),
                _no_collection(),
            ):
                try:
                    self._begin(graph)
                    try:
                        result = run()
                    except BaseException as error:
                        cause = error  # what the end of the capture may raise only follows from it
                    graph.capture_end()
                finally:
                    # A workspace from the capture would keep the pool from ending, and eager work
                    # on this stream would write to it.
                    clear_workspaces(self.stream)
        except BaseException as error:
            cause, ended = cause or error, False
        if cause is None:
            self._graphs.add(graph)
            return result, graph
        if not ended:
            self._abandon(graph)
        try:
            raise cause
        finally:
            del cause, graph, others  # or they and this frame would hold each other

    def _begin(self, graph: torch.cuda.CUDAGraph) -> None:
        """Begin the capture on the current stream, with as much free memory as can be had.

        Not torch.cuda.graph, which empties the cache after its caller has cleared the workspaces:
        where that clears those of all threads, one whose product is about to be launched would have
        its workspace unmapped.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):  # since torch 2.7
            torch._C._host_emptyCache()
        # A workspace from eager work on this stream lies outside the pool: it would be freed
        # beneath the graph.
        clear_workspaces(self.stream)
        # thread_local: other threads may allocate meanwhile
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a capture that could not be ended: the next one gets another pool and
        stream.
        """
        index, pool = self.device.index, self._pool
        if self._return_stream is not None:
            self._return_stream.detach()  # it may still be in capture mode
        self._pool = self._stream = self._return_stream = None
        self._graphs = weakref.WeakSet()
        graph.reset()
        name = "_cuda_endAllocateToPool"
        end = getattr(
            torch._C, name if hasattr(torch._C, name) else "_cuda_endAllocateCurrentStreamToPool"
        )
        try:
            end(index, pool)
        except RuntimeError:  # torch has ended it, as 2.14 does
            return
        torch._C._cuda_releasePool(index, pool)
        _UNENDED.append(graph)
        generator = torch.cuda.default_generators[index]
        # the same random numbers, from a state that no capture owns
        generator.graphsafe_set_state(generator.clone_state())


_UNENDED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture torch, up to 2.11, did not end: its allocator of pinned memory still calls
them.
"""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage before, not inside: the end of an old graph would disturb a capture."""
    gc.collect()  # it may hold memory as well
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
