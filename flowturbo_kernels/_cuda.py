"""Launches of csrc's kernels, from the extension or, where it was not built, compiled at first use
by CuPy's NVRTC; and what they can take.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _nvrtc
from ._pdl import dependent_launch
from ._triton import rows

NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
"""csrc's names of dtypes."""


class Launcher(Protocol):
    """dependent: by programmatic dependent launch. All of csrc's kernels wait for those before
    them, as such a kernel must.
    """

    def __call__(
        self,
        name: str,
        grid: tuple[int, ...],
        threads: int,
        shared: int,
        args: bytes,
        stream: int,
        dependent: bool,
    ) -> None: ...


def unavailable(device: torch.device) -> str | None:
    """Why csrc's kernels can't run on tensors of that device, or None."""
    if device.type != "cuda":
        return f"tensors are on the {device.type}"
    return _launcher(torch.cuda.get_device_capability(device))[1]


def launch(
    name: str, grid: tuple[int, ...], threads: int, shared: int, args: ctypes.Structure
) -> None:
    """Launch a kernel, by the name of its template instance, on torch's current stream.
    RuntimeError, which names it, if it can't run.
    """
    launcher, problem = _launcher_on(torch.cuda.current_device())
    if launcher is None:
        raise RuntimeError(f"{name}: {problem}")
    stream = torch.cuda.current_stream().cuda_stream
    launcher(name, grid, threads, shared, bytes(args), stream, dependent_launch())


@functools.cache
def _launcher_on(device: int) -> tuple[Launcher | None, str | None]:
    return _launcher(torch.cuda.get_device_capability(device))


@functools.cache
def _launcher(capability: tuple[int, int]) -> tuple[Launcher | None, str | None]:
    """(a launcher for such a GPU, None), or (None, why there is none)."""
    try:
        extension = importlib.import_module("flowturbo_kernels._C")
    except ImportError as error:
        missing = f"the extension is not built ({error})"
    else:
        built = extension.build_info().architectures.split()
        if runs_on(built, capability):
            return extension.launch, None
        missing = (
            f"the extension holds code for sm_{', sm_'.join(built)}, not for "
            f"sm_{capability[0]}{capability[1]}"
        )
    try:
        return _nvrtc.Launcher(), None
    except ImportError as error:
        return None, f"{missing}, and CuPy is not installed ({error})"
    except OSError as error:
        return None, f"{missing}, and its sources can't be read ({error})"


def runs_on(built: list[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor one on; with an "a", on its own
    architecture only.
    """
    for arch in built:
        digits, exact = re.fullmatch(r"(\d+)(a?)", arch).groups()  # type: ignore[union-attr]
        major, minor = int(digits[:-1]), int(digits[-1])
        if (major, minor) == capability or (
            not exact and major == capability[0] and minor <= capability[1]
        ):
            return True
    return False


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def vector(dtype: torch.dtype, *multiples: int) -> int:
    """Numbers that a thread loads at once: 16 bytes of them where all these sizes and strides are
    multiples of that, else one.
    """
    size = 16 // dtype.itemsize
    return size if all(m % size == 0 for m in multiples) else 1


def misaligned(*tensors: Tensor | None) -> bool:
    """Whether a tensor's memory does not start at a multiple of 16 bytes."""
    return any(t is not None and t.data_ptr() % 16 for t in tensors)


def in_vectors(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose last axis is dense, with rows that start at multiples of 16
    bytes; its length must be a multiple of them, too.
    """
    tensor, size = rows(tensor), 16 // tensor.element_size()
    if misaligned(tensor) or any(s % size for s in tensor.stride()[:-1]):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def no_vectors(dtype: torch.dtype, what: str, size: int) -> str | None:
    """Why a kernel of 16-byte vectors can't take rows of that many numbers, or None."""
    multiple = 16 // dtype.itemsize
    return f"{what} must be a multiple of {multiple}, got {size}" if size % multiple else None


def same_dtype(*tensors: Any) -> str | None:
    """Why a kernel with one dtype can't take these, or None."""
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)}
    return (
        None
        if len(dtypes) <= 1
        else f"tensors are of several dtypes, {', '.join(sorted(map(str, dtypes)))}"
    )
