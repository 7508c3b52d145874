"""CUDA streams for captures: private ones, and the cuBLAS workspaces that belong to a stream.

`torch.cuda.Stream()` hands out the same 32 streams in turn, so every 32nd caller gets a stream that
somebody has already. Work that another thread puts on a stream under capture becomes part of that
graph and is not executed, so captures need streams that torch gives to nobody.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

_NON_BLOCKING = 1
"""cudaStreamNonBlocking: no implicit wait for the legacy default stream, as for torch's streams."""

_idle: dict[int, list[torch.cuda.Stream]] = {}
"""Private streams without an owner, by device. They are reused and never destroyed: torch's
allocator and cuBLAS's workspaces are keyed by a stream's address, which CUDA would reuse."""


def take_private_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has, until it is returned."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        try:
            return _idle.setdefault(index, []).pop()
        except IndexError:
            return _new_stream(index)


def return_private_stream(stream: torch.cuda.Stream) -> None:
    """For the next owner. A stream whose capture could not be ended must not come back."""
    _idle.setdefault(stream.device.index, []).append(stream)


def _new_stream(index: int) -> torch.cuda.Stream:
    """On the current device. Where the CUDA runtime can't be called directly, one of torch's own:
    of high priority, since those 32 have the fewest other users.
    """
    handle = ctypes.c_void_p()
    try:
        # torch loads the runtime with global symbols. Not torch.cuda.cudart().cudaStreamCreate:
        # its streams wait for the default stream.
        create = ctypes.CDLL(None).cudaStreamCreateWithFlags
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no global symbols
        return torch.cuda.Stream(index, priority=-1)
    torch.cuda.init()
    if create(ctypes.byref(handle), _NON_BLOCKING) != 0 or not handle.value:
        return torch.cuda.Stream(index, priority=-1)
    return torch.cuda.ExternalStream(handle.value, device=index)


def clear_workspaces(stream: torch.cuda.Stream) -> None:
    """Free the cuBLAS workspaces of that stream, into the allocator's cache.

    Up to torch 2.11 those of all streams, for lack of anything finer. Another thread may have
    fetched its workspace's address and not yet launched its product: the memory must stay mapped
    until then, so the cache must not be emptied right after this.
    """
    of_stream = _clear_workspaces_of_stream()
    if of_stream is not None:
        of_stream(stream.cuda_stream)
    elif hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


_CLEAR_OF_STREAM = "_ZN2at4cuda30clearCublasWorkspacesForStreamEP11CUstream_st"
"""at::cuda::clearCublasWorkspacesForStream, which newer versions of torch have, without a binding
for Python.
"""


@functools.cache
def _clear_workspaces_of_stream() -> Callable[[int], None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    try:
        clear = getattr(ctypes.CDLL(str(library)), _CLEAR_OF_STREAM)
    except (AttributeError, OSError):
        return None
    clear.argtypes, clear.restype = [ctypes.c_void_p], None
    return clear
