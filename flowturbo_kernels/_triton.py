"""Triton kernels that compile at their first launch, so that importing this package imports no
Triton; when Triton can run; and what its kernels can take.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._pdl import dependent_launch

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set in a kernel's module when its first kernel is compiled

__all__ = [
    "Kernel",
    "dot_precision",
    "in_turn",
    "kernel",
    "next_power_of_2",
    "pieces",
    "rows",
    "tl",
    "too_large",
    "too_many_images",
    "too_many_rows",
    "unavailable",
]


class Kernel:
    """A function in Triton's language; launch(grid, *args, **options) is Triton's
    kernel[grid](*args, **options).

    One whose last parameter is PDL calls in_turn(PDL) before all else, and takes part in
    programmatic dependent launch where the current device has it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__, self.__doc__, self.__module__ = (
            function.__name__,
            function.__doc__,
            function.__module__,
        )

    @functools.cached_property
    def jit(self) -> Any:
        import triton

        names = self.function.__globals__
        names["tl"] = triton.language
        for name in self.function.__code__.co_names:  # kernels that this one calls
            called = names.get(name)  # once: another thread may replace it meanwhile
            if isinstance(called, Kernel):
                names[name] = called.jit
        return triton.jit(self.function)

    @functools.cached_property
    def in_turn(self) -> bool:
        return "PDL" in self.function.__code__.co_varnames[: self.function.__code__.co_argcount]

    def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if self.in_turn:
            options |= pdl_options(_dependent_launch())
        self.jit[grid](*args, **options)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a Kernel."""
    return Kernel(function)


def pdl_options(on: bool) -> dict[str, bool]:
    """A launch's options with programmatic dependent launch, or without."""
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@kernel
def in_turn(PDL: tl.constexpr):
    """Programmatic dependent launch: this kernel was launched while those before it may still run.

    So it waits for them before it reads or writes anything; then it lets the next one start, whose
    blocks come up while this kernel's last ones run. A kernel without this wait must not be
    launched so: neither it nor those after it would see what was written before.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def _dependent_launch() -> bool:
    """Whether the current device and this Triton have programmatic dependent launch, and it is
    wanted.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return False
    return dependent_launch() and _triton_has_it()


@functools.cache
def _triton_has_it() -> bool:
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra import cuda

    return "launch_pdl" in CUDAOptions.__dataclass_fields__ and hasattr(cuda, "gdc_wait")


def unavailable(device: torch.device) -> str | None:
    """Why Triton can't run on tensors of that device, or None. On the CPU it can under its
    interpreter (TRITON_INTERPRET=1).
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on the cpu, and TRITON_INTERPRET=1 is not set"
    if device.type not in ("cpu", "cuda"):
        return f"tensors are on the {device.type}"
    if device.type == "cuda" and device not in _probed and torch.cuda.is_current_stream_capturing():
        return "it was not tried before this CUDA graph's capture, which forbids trying"
    reason = _problem(device)
    _probed.add(device)
    return reason


_probed: set[torch.device] = set()


@functools.cache
def _problem(device: torch.device) -> str | None:
    """Why the smallest kernel does not run, or None: Triton needs a C compiler and Python's headers
    at its first launch.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            probe = torch.zeros(1, dtype=torch.float32, device=device)
            _one.launch((1,), probe)
            return None if float(probe) == 1 else "its smallest kernel gave a wrong result"
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        return (
            f"its smallest kernel failed ({type(error).__name__}: {error}); it needs a C "
            "compiler and Python's headers"
        )


@kernel
def _one(ptr):
    tl.store(ptr, 1.0)


MAX_IMAGES = 65535
"""The limit of a grid's second and third axis."""
INT32_MAX = 2**31 - 1
"""The limit of its first axis, and of 32-bit offsets."""


def too_many_images(n: int) -> str | None:
    """Why a kernel with images on such an axis can't take n of them, or None."""
    return None if n <= MAX_IMAGES else f"at most {MAX_IMAGES} images at a time, got {n}"


def too_many_rows(n: int) -> str | None:
    """Why a kernel with one program per row can't take n of them, or None."""
    return None if n <= INT32_MAX else f"at most {INT32_MAX} rows at a time, got {n}"


def too_large(numbers: int) -> str | None:
    """Why a kernel with 32-bit offsets inside an image can't take so many numbers, or None."""
    most = INT32_MAX - 65535  # offsets of the last block may exceed the image
    return None if numbers <= most else f"at most {most} numbers an image, got {numbers}"


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def pieces(n: int) -> tuple[int, int]:
    """(a, b), powers of two with a < n <= a + b, for n >= 2: a row in two loads, 1152 = 1024 + 128,
    72 = 64 + 8.

    One load of the next power of two would mask up to half of its lanes.
    """
    main = next_power_of_2(n) // 2
    return main, next_power_of_2(n - main)


def rows(x: Tensor) -> Tensor:
    """x, or a copy, with a dense last axis, which all kernels need; the other axes may have any
    stride.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def dot_precision(x: Tensor) -> str:
    """input_precision of tl.dot: no TF32 for float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
