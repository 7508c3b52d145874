"""What figures depend on besides their settings, to be named in a report and compared when an evaluation goes on."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .models import MODELS


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What milliseconds, and last bits, depend on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "flowturbo": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def file_digest(path: str | os.PathLike[str] | None) -> str | None:
    """SHA-256 of a file, read a piece at a time."""
    if path is None:
        return None
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            hashed.update(piece)
    return hashed.hexdigest()


def model_digests(model: str | os.PathLike[str], refiner: str | os.PathLike[str] | None) -> dict[str, str | None]:
    """SHA-256 of a model's files; a bundled model brings its own refiner."""
    bundled = MODELS.get(str(model))
    return {
        "predictor_sha256": file_digest(bundled.predictor if bundled else model),
        "refiner_sha256": file_digest(bundled.refiner if bundled and refiner is None else refiner),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """In words, what of these parts of a report is not as it was."""
    return [
        f"{part}.{key} was {before[part].get(key)!r} and is now {value!r}"
        for part in parts
        for key, value in now[part].items()
        if before[part].get(key) != value
    ]
