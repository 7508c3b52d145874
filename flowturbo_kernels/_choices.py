"""The fastest candidates, on disk: a file for each kind of machine and each version of torch,
Triton, the libraries whose kernels are candidates, and these kernels.

The file holds the facts it is valid for, and under each key an entry: {"fastest": name, "us":
{name: microseconds per call}, "cannot": {name: why}}. Several processes may write: each adds to
what the others wrote, and reads it when it does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ._cache import cache_folder, write_atomically

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

Entry = dict[str, Any]

_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)
"""Variables that libraries read once, and select kernels by."""


@functools.cache
def facts(device: torch.device) -> Mapping[str, Any]:
    """All that decides what is fastest and does not change in this process. Cards of one name may
    differ in clocks and memory.
    """
    p = torch.cuda.get_device_properties(device)
    properties = {
        name: getattr(p, name, None)
        for name in (
            "multi_processor_count",
            "L2_cache_size",
            "clock_rate",
            "memory_clock_rate",
            "memory_bus_width",
        )
    }
    return {
        "device": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory_gib": round(p.total_memory / 2**30),  # the exact number depends on the driver
        **properties,
        **_versions(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def _versions() -> dict[str, str | None]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    try:
        cudnn = str(torch.backends.cudnn.version())
    except RuntimeError as error:  # another version than torch was built for
        cudnn = str(error)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "cublas": _installed("nvidia-cublas", "nvidia-cublas-cu12"),
        "cudnn": cudnn,
        "quack": _installed("quack-kernels"),
        "flash_attn": _installed("flash-attn-4"),
        "cutlass": _installed("nvidia-cutlass-dsl"),
        "kernels": _digest_of_kernels(),
    }


def _installed(*names: str) -> str | None:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _folder() -> Any:
    """This package's folder; it may be in a zip."""
    return importlib.resources.files(__package__)


def _digest_of_kernels() -> str:
    """Of this package's sources: kernels, candidates and measurement. Without sources, the
    version.
    """
    sources = [file for file in _folder().iterdir() if file.name.endswith(".py")]
    texts = [file.read_bytes() for file in sorted(sources, key=lambda file: file.name)]
    if not texts:
        return str(_installed("flowturbo"))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def file(of: Mapping[str, Any]) -> Path:
    """The file for machines with these facts; its name has some of them, and a digest of all."""
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    name = f"fastest {of['device']} torch {of['torch']} triton {of['triton']}"
    return cache_folder() / f"{re.sub('[^A-Za-z0-9.+]', '-', name)[:200]}-{digest}.json"


def read(of: Mapping[str, Any]) -> dict[str, Entry]:
    """All entries; none where the file is missing, damaged, or for other facts."""
    try:
        content = json.loads(file(of).read_text(encoding="utf-8"))
        if json.dumps(content["of"], sort_keys=True) != json.dumps(of, sort_keys=True):
            return {}
        return {
            k: e
            for k, e in content["choices"].items()
            if isinstance(e, dict) and isinstance(e.get("fastest"), str)
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def add(
    of: Mapping[str, Any], key: str, entry: Entry, names: Container[object]
) -> dict[str, Entry]:
    """Add an entry -> all entries. Where another process has added one under this key, that one
    stays, so that all processes use the same.

    names: of the candidates; an entry that names none of them is replaced.
    """
    path = file(of)
    with _locked(path.with_suffix(".lock")):
        entries = read(of)
        if entries.get(key, {}).get("fastest") not in names:
            entries[key] = entry
        write_atomically(
            path, json.dumps({"of": of, "choices": entries}, indent=1, sort_keys=True).encode()
        )
    return entries


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude other processes. Without locks in the file system nobody is excluded: what another
    process adds meanwhile may be lost, and is measured again.
    """
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "ab")  # noqa: SIM115
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        if handle is not None:
            handle.close()
