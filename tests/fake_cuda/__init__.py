"""A stand-in for a CUDA device, from Python: whether this process runs on it, and what was done
there.

Device memory is host memory and kernels do nothing, so that no value means anything; streams,
events, captures, pools and launch limits follow CUDA's rules. `python tests/fake_cuda/run.py
COMMAND...` runs a command on it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PRESENT = bool(os.environ.get("FAKE_CUDA"))
_library: Any = ctypes.CDLL(None) if PRESENT else None


def _hide_static_runtime() -> None:
    """An extension built without run.py holds a CUDA runtime of its own, which looks for a real
    driver: it counts as not built here, so that NVRTC compiles csrc's kernels.
    """
    name = "flowturbo_kernels._C"
    spec = importlib.util.find_spec(name)
    if spec and spec.origin and b"libcuda.so.1" in Path(spec.origin).read_bytes():
        sys.modules[name] = None  # type: ignore[assignment]


if PRESENT:
    _hide_static_runtime()


def _lines(function: Any) -> list[str]:
    size = function(None, 0)
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = function(buffer, size)
        if needed <= size:
            return buffer.value.decode().splitlines()
        size = needed


def violations() -> list[str]:
    """What CUDA forbids, or the stand-in does not know, and was done since the last call."""
    return _lines(_library.fake_cuda_violations)


def launches() -> list[str]:
    """Kernels and replays of graphs since the last call, by name, outside captures."""
    return _lines(_library.fake_cuda_launches)


def dependents() -> list[str]:
    """Kernels launched by programmatic dependent launch since the last call, by name, in captures
    too.
    """
    return _lines(_library.fake_cuda_dependents)


def captured() -> list[str]:
    """The nodes of the graph whose capture ended last, by name."""
    return _lines(_library.fake_cuda_captured)


@contextmanager
def before_products(call: Callable[[], None]) -> Iterator[None]:
    """Calls this before each launch of a cuBLAS product, in the thread that launches it."""
    hook = ctypes.CFUNCTYPE(None)(call)
    _library.fake_cuda_before_product(hook)
    try:
        yield
    finally:
        _library.fake_cuda_before_product(None)


def set_memory(mib: int | None) -> None:
    """The device's memory from now on; None: what such a device has."""
    _library.fake_cuda_set_memory(ctypes.c_ulonglong(mib or 0))
