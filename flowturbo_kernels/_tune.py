"""The fastest of several ways of running an operation, measured once for a device, shape and dtype, and remembered on disk."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_REPEATS = 20
_lock = threading.Lock()


def fastest(key: str, candidates: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """The name of the candidate that runs fastest on the device.

    key: names operation, shapes and dtypes. The first candidate is the default: it is taken, and nothing measured or remembered,
    off CUDA and while a CUDA graph is being captured, which forbids measuring. A candidate that fails is taken only if all do.
    """
    default = next(iter(candidates))
    if device.type != "cuda" or len(candidates) == 1:
        return default
    known = _remembered(device)
    choice = known.get(key)
    if choice in candidates:
        return str(choice)
    if torch.cuda.is_current_stream_capturing():
        return default
    with _lock:
        times = {name: _attempt(run) for name, run in candidates.items()}
        best = min(times, key=lambda name: times[name])
        known[key] = best
        _write(_file(device), known)
    return best


def _attempt(run: Callable[[], Any]) -> float:
    try:
        return seconds(run)
    except Exception:  # whatever a compiler or a library may raise for a shape that it can't do
        torch.cuda.synchronize()
        return float("inf")


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call, on the device: of replays of a graph of several, since launches are gone where speed matters."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(_REPEATS):
                run()
        graph.replay()
        times = []
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / _REPEATS)
    torch.cuda.current_stream().wait_stream(stream)
    return min(times)


@functools.cache
def _remembered(device: torch.device) -> dict[str, str]:
    """What earlier processes measured on such a device; nothing where the file is missing or damaged."""
    try:
        found = json.loads(_file(device).read_text())
        return {str(k): str(v) for k, v in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _file(device: torch.device) -> Path:
    """FLOWTURBO_CACHE, else ~/.cache/flowturbo; one file a device and pair of versions, which decide what is fastest."""
    folder = os.environ.get("FLOWTURBO_CACHE") or Path.home() / ".cache" / "flowturbo"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    name = f"fastest {_device_name(device)} torch {torch.__version__} triton {version}.json"
    return Path(folder) / "".join(c if c.isalnum() or c in ".+" else "-" for c in name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _write(path: Path, known: Mapping[str, str]) -> None:
    """Whole or not at all; a folder that can't be written costs a measurement in the next process, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(dict(known), file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError:
        pass
