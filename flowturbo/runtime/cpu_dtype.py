"""Which dtype a model gets, and whether bfloat16 is worth it on this CPU."""

from __future__ import annotations

import contextlib
import functools
import re
import time
import warnings
from pathlib import Path
from typing import Literal

import torch

from flowturbo_kernels.batch_invariant import matmul, multiplies_bfloat16

_INSTRUCTIONS = "amx_bf16", "avx512_bf16", "bf16"
"""As /proc/cpuinfo names those that multiply bfloat16; the last is Arm's."""
_CPUINFO = Path("/proc/cpuinfo")
VELOCITY_ERROR = "0.6 %"
"""Of the bundled digits in bfloat16, relative to float64."""


def choose_dtype(dtype: torch.dtype | Literal["auto"] | None, device: torch.device) -> torch.dtype:
    """The dtype asked for. None: bfloat16 on a GPU, else float32. "auto": bfloat16 also on a CPU
    that has instructions for it.

    The choice depends on what the CPU is, not on timings, so that it is the same in every run.
    Raises TypeError for what is no floating point type.
    """
    if dtype is None or dtype == "auto":
        narrow = device.type == "cuda" or (dtype == "auto" and bool(bfloat16_instructions()))
        return torch.bfloat16 if narrow else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type or 'auto', got {dtype!r}")
    return dtype


@functools.cache
def bfloat16_instructions() -> tuple[str, ...]:
    """This CPU's instructions for products in bfloat16; empty if torch can't use them."""
    if not multiplies_bfloat16():
        return ()
    with contextlib.suppress(OSError):  # there is none off Linux, and some sandboxes hide it
        return instructions_in(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return ("avx512_bf16",) if supported else ()


def instructions_in(cpuinfo: str) -> tuple[str, ...]:
    """Those for products in bfloat16 that /proc/cpuinfo lists."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    words = line[1].split() if line else []
    return tuple(name for name in _INSTRUCTIONS if name in words)


@functools.cache
def warn_if_slow() -> None:
    """Warn, once, if bfloat16 is no faster than float32 on this CPU."""
    if not bfloat16_instructions():
        warnings.warn(
            "this CPU has no bfloat16 instructions: in bfloat16 the model takes less memory than "
            "in float32, but more time, and is less exact; dtype='auto' chooses the faster",
            stacklevel=4,
        )


def product_ratio(limit: float = 0.3) -> float:
    """The time of a matrix product in bfloat16 over that in float32, measured alternately in about
    `limit` seconds: 512 rows of 768 features times a square weight.
    """
    operands = {
        dtype: [
            torch.ones(size, dtype=dtype, device="cpu") for size in ((512, 768), (768, 768), (768,))
        ]
        for dtype in (torch.float32, torch.bfloat16)
    }
    fastest = dict.fromkeys(operands, float("inf"))
    for product in operands.values():
        matmul(*product)
    end = time.perf_counter() + limit
    while True:
        for dtype, product in operands.items():
            start = time.perf_counter()
            matmul(*product)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
        if time.perf_counter() > end:
            return fastest[torch.bfloat16] / fastest[torch.float32]


def bfloat16_advice() -> str:
    """Whether bfloat16 is worth it on this CPU, and why, in a line."""
    names = bfloat16_instructions()
    facts = f"this CPU has {', '.join(names)}" if names else "this CPU has no instructions for it"
    return (
        f"{'worth it' if names else 'not worth it'}, says dtype='auto': {facts}; products take "
        f"{product_ratio():.2f} of float32's time, measured now; the bundled digits' velocity errs "
        f"by {VELOCITY_ERROR}"
    )
