"""CUDA graphs: recording one so that no other thread is disturbed, and making torch whole where a
recording fails.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

RECORDING = threading.RLock()
"""Held by whoever records. One at a time: to wait for the device, as each does before and after,
breaks a recording that is under way in another thread, in whatever mode."""


class GraphPool:
    """Records graphs of one device. All share one pool of memory, so that their replays must take
    turns, and one stream, without which they would share the pool's name and none of its memory.

    torch ends a pool with the last graph in it, and takes its id for no other: a pool is made anew
    when no graph is alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # of that pool

    @property
    def stream(self) -> torch.cuda.Stream:
        """On which graphs are recorded: a new one after a failure."""
        self._stream = self._stream or torch.cuda.Stream(self.device)
        return self._stream

    def record(self, run: Callable[[], T]) -> tuple[T, torch.cuda.CUDAGraph]:
        """What run returns, whose memory the graph fills at each replay, and the graph. What run
        raises is raised.
        """
        graph = torch.cuda.CUDAGraph()
        others = list(self._graphs)  # held here, lest the pool end meanwhile
        if self._pool is None or not others:
            self._pool = torch.cuda.graph_pool_handle()
        cause, ended = None, True
        try:
            # torch.cuda.graph leaves its stream the current one where the capture can't be ended:
            # this puts it back.
            with (
                RECORDING,
                torch.cuda.device(self.device),
                torch.cuda.stream(self.stream),
                _no_collection(),
            ):
                _clear_workspaces()
                # Other threads may allocate meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    try:
                        result = run()
                    except BaseException as error:
                        cause = error  # what the end of the capture may raise only follows from it
        except BaseException as error:
            cause, ended = cause or error, False
        _clear_workspaces()
        if cause is None:
            self._graphs.add(graph)
            return result, graph
        if not ended:
            self._abandon(graph)
        try:
            raise cause
        finally:
            del cause, graph, others  # or they and this frame would hold each other

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Make whole what a capture leaves behind that could not be ended. The next one has a pool
        and a stream of its own.
        """
        index, pool = self.device.index, self._pool
        self._pool = self._stream = None
        self._graphs = weakref.WeakSet()
        graph.reset()
        name = "_cuda_endAllocateToPool"
        end = getattr(
            torch._C, name if hasattr(torch._C, name) else "_cuda_endAllocateCurrentStreamToPool"
        )
        try:
            end(index, pool)
        except RuntimeError:  # not recording any more: torch did this itself, as 2.14 does
            return
        torch._C._cuda_releasePool(index, pool)
        _UNENDED.append(graph)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(
            generator.clone_state()
        )  # the same numbers, and no longer those of a capture


_UNENDED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture torch did not end, up to version 2.11: its allocator of pinned memory goes
on asking them.
"""


def _clear_workspaces() -> None:
    """Give back cuBLAS's workspaces. A product takes one for each thread and stream and keeps it:
    one that was made in a capture would keep the pool from ending, and one that was made outside it
    would be given back, or used by others, beneath the graph."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python collects its garbage before and not inside: a capture must not be disturbed by the end
    of somebody's old graph.
    """
    gc.collect()  # it may hold memory, too
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
