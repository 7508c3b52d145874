"""Provenance: what results depend on besides their settings.

Reports name it, and a run that resumes compares it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

import torch

from ..runtime.device import device_name
from ..version import __version__


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Machine and versions, on which timings and the last bits of results depend."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "flowturbo": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def file_digest(path: str | os.PathLike[str] | None) -> str | None:
    """SHA-256 of a file, as hexadecimal digits; None for None."""
    if path is None:
        return None
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            hashed.update(piece)
    return hashed.hexdigest()
