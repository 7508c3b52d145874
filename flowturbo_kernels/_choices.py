"""What was measured as fastest, on disk: a file for each kind of machine, of each version of torch,
Triton and these kernels.

The file holds the facts that it is of, and under each key an entry: {"fastest": name, "us": {name:
microseconds of a call}, "cannot": {name: why}}. Several processes may write: each adds to what the
others wrote, and sees it when it does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ._cache import cache_folder, whole_file

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
"""What libraries read once, and choose their kernels by."""


@functools.cache
def facts(device: torch.device) -> Mapping[str, Any]:
    """All that decides what is fastest and stays as it is in this process. Cards of one name differ
    in clocks and memory.
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
        "memory_gib": round(p.total_memory / 2**30),  # to the byte it is a matter of the driver
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
    except RuntimeError as error:  # not the one that torch was built for
        cudnn = str(error)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "cublas": _installed("nvidia-cublas", "nvidia-cublas-cu12"),
        "cudnn": cudnn,
        "kernels": _digest_of_kernels(),
    }


def _installed(*names: str) -> str | None:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _digest_of_kernels() -> str:
    """Of this package's sources: kernels, candidates and how they are measured. Without sources,
    the version.
    """
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    if not texts:
        return str(_installed("flowturbo"))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def file(of: Mapping[str, Any]) -> Path:
    """Where the choices are kept of machines of these facts; the name tells some of them, and a
    digest of all.
    """
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    said = f"fastest {of['device']} torch {of['torch']} triton {of['triton']}"
    return cache_folder() / f"{re.sub('[^A-Za-z0-9.+]', '-', said)[:200]}-{digest}.json"


def read(of: Mapping[str, Any]) -> dict[str, Entry]:
    """All entries; none where the file is missing, damaged, or of other facts."""
    try:
        found = json.loads(file(of).read_text(encoding="utf-8"))
        if json.dumps(found["of"], sort_keys=True) != json.dumps(of, sort_keys=True):
            return {}
        return {
            k: e
            for k, e in found["choices"].items()
            if isinstance(e, dict) and isinstance(e.get("fastest"), str)
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def add(
    of: Mapping[str, Any], key: str, entry: Entry, names: Container[object]
) -> dict[str, Entry]:
    """All entries, this one among them, unless another process was quicker: all go by the one that
    was first.

    names: of the candidates; an entry that names another is replaced.
    """
    path = file(of)
    with _locked(path.with_suffix(".lock")):
        entries = read(of)
        if entries.get(key, {}).get("fastest") not in names:
            entries[key] = entry
        whole_file(
            path, json.dumps({"of": of, "choices": entries}, indent=1, sort_keys=True).encode()
        )
    return entries


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes. Where the file system knows no locks, nobody is kept out: what another
    adds meanwhile may be lost, and is measured again."""
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
