"""Devices and dtypes: how they are chosen, named and timed."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch


def device_name(device: torch.device) -> str:
    """The model name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        line = re.search(
            r"^model name\s*:\s*(.+)$",
            cpuinfo.read_text(encoding="utf-8", errors="replace"),
            re.MULTILINE,
        )
        if line:
            return line[1].strip()
    return platform.processor() or platform.machine()


Dtype = Literal["float32", "bfloat16", "float16"]


def dtype_of(name: Dtype | None) -> torch.dtype | None:
    """The torch dtype of that name; None for None."""
    return getattr(torch, name) if name else None


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; the device is synchronised before and after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: a GPU if there is one, else the CPU.

    Raises ValueError for an unknown name, and for CUDA where torch sees no CUDA device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be a device of torch such as 'cuda' or 'cpu', got {device!r}: {error}"
        ) from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) sees no "
            "CUDA device"
        )
    return resolved
