"""The fastest of several ways of running an operation, measured once for a device, shape and dtype,
and remembered on disk.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _choices
from ._measure import Timing, rotating, timing

_lock = threading.Lock()
_chosen: dict[Hashable, str] = {}
_read: dict[torch.device, dict[str, _choices.Entry]] = {}
"""What this process last saw on disk."""


class Ways(NamedTuple):
    """Several ways of running one operation on the same arguments.

    question: the operation, and all of the arguments that decides; of tensors their `form`.
    candidates: name -> function of the cold tensors; the first one is the default.
    cold: the weights. A plan has read hundreds of megabytes since it last read them, so candidates
    are timed on copies in turn. Other tensors are bound in the candidates and stay the same: a
    plan's last kernel has just written them.
    """

    question: tuple[Hashable, ...]
    candidates: Mapping[str, Callable[..., Any]]
    device: torch.device
    cold: tuple[Tensor, ...] = ()

    def run(self) -> Any:
        """The result of the fastest."""
        return self.candidates[fastest(self)](*self.cold)

    def chosen(self) -> str | None:
        """The name of the fastest if that was measured, here or by a process before; now nothing
        is.
        """
        measurable = self.device.type == "cuda" and len(self.candidates) > 1
        return _known(self, _key(self)) if measurable else None


def fastest(ways: Ways) -> str:
    """The name of the candidate that runs fastest on the device.

    The default is taken, and nothing measured or remembered, off CUDA and while a CUDA graph is
    being captured, which forbids measuring. A candidate that fails is taken only if all do, and
    then the default, which will say why. On disk goes what will hold in other processes as well: no
    choice in which a candidate failed for a reason of the moment, which timings that vary much
    leave in doubt, or for which weights could not rotate for want of memory. Such a one holds in
    this process only.
    """
    default = next(iter(ways.candidates))
    if ways.device.type != "cuda" or len(ways.candidates) == 1:
        return default
    key = _key(ways)
    choice = _known(ways, key)
    if choice is not None:
        return choice
    if torch.cuda.is_current_stream_capturing():
        return default
    with _lock:  # another thread, or process, may have measured it meanwhile
        choice = _chosen[key] = _known(ways, key, anew=True) or _measured(ways)
    return choice


def _key(ways: Ways) -> Hashable:
    return ways.device, ways.question, tuple(ways.candidates), _settings()


def _written(ways: Ways) -> str:
    """The key on disk. Other candidates are another question."""
    names = hashlib.sha256("\n".join(ways.candidates).encode()).hexdigest()[:8]
    settings = (f"{name} {value}" for name, value in zip(_getters(), _settings(), strict=True))
    return (
        f"{' '.join(map(str, ways.question))} | {len(ways.candidates)} ways {names} | "
        f"{', '.join(settings)}"
    )


def _known(ways: Ways, key: Hashable, anew: bool = False) -> str | None:
    """What this process has chosen, or what it saw on disk; anew: after another look."""
    if key in _chosen:
        return _chosen[key]
    if anew or ways.device not in _read:
        _read[ways.device] = _choices.read(_choices.facts(ways.device))
    choice = _read[ways.device].get(_written(ways), {}).get("fastest")
    if choice in ways.candidates:
        _chosen[key] = str(choice)
    return _chosen.get(key)


def _measured(ways: Ways) -> str:
    """The fastest, written to disk if it will hold."""
    timings: dict[str, Timing] = {}
    cannot: dict[str, str] = {}
    lasting = True
    with rotating(ways.cold, ways.device) as (sets, enough):
        for name, run in ways.candidates.items():
            try:
                timings[name] = timing(run, sets, ways.device)
            except (
                Exception
            ) as error:  # whatever a compiler or a library may raise for a shape that it can't do
                cannot[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                lasting &= _lasting(error)
    if not timings:
        return next(iter(ways.candidates))
    choice = min(timings, key=lambda name: timings[name].seconds)
    if not (enough and lasting and all(timing.steady for timing in timings.values())):
        return choice
    us = {name: round(1e6 * timing.seconds, 3) for name, timing in timings.items()}
    entry = {"fastest": choice, "us": us, "cannot": cannot}
    _read[ways.device] = _choices.add(
        _choices.facts(ways.device), _written(ways), entry, ways.candidates
    )
    return str(_read[ways.device][_written(ways)]["fastest"])


_LASTING = {"OutOfResources", "CompilationError", "BackendError", "NotImplementedError"}
"""Errors of Triton, ours and Python's, by their names, since Triton need not be there."""


def _lasting(error: Exception) -> bool:
    """Whether a candidate will fail so wherever it is asked for under this key.

    That is so where its code does not compile or needs what such a device does not have, or where
    its library says that it can't. Whatever else is taken for a failure of the moment, as lack of
    memory is, and all other errors of CUDA.
    """
    if any(kind.__name__ in _LASTING for kind in type(error).__mro__):
        return True
    return (
        isinstance(error, RuntimeError)
        and re.search(r"(not|only).supported|unsupported", str(error), re.IGNORECASE) is not None
    )


# The key is made at every call, so it is of plain values: text is made of it where it goes to disk.


def form(tensor: Tensor) -> tuple[Hashable, ...]:
    """What decides of a tensor: dtype, shape, and of its strides and its address what kernels are
    compiled and chosen by.
    """
    return (
        tensor.dtype,
        _layout(tensor.shape, tensor.stride()),
        "" if tensor.data_ptr() % 16 == 0 else "unaligned",
    )


@functools.lru_cache(4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    """As 512x1152, and where it is not dense the kind of each axis: of stride 1, of a multiple of
    16, of another.
    """
    dense, expected = True, 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        dense &= n == 1 or stride == expected
        expected *= n
    kinds = [
        "-" if n == 1 else "1" if s == 1 else "16" if s % 16 == 0 else "any"
        for n, s in zip(shape, strides, strict=True)
    ]
    return "x".join(map(str, shape)) + ("" if dense else f" strides {','.join(kinds)}")


_SETTINGS = {
    # how the key on disk names it: torch's inner name, which is quick, and which has no quarrel
    # with another way of setting it
    "tf32": "_get_cublas_allow_tf32",
    "bf16 reduction": "_get_cublas_allow_bf16_reduced_precision_reduction",
    "fp16 reduction": "_get_cublas_allow_fp16_reduced_precision_reduction",
    "fp16 accumulation": "_get_cublas_allow_fp16_accumulation",
    "blas": "_get_blas_preferred_backend",
    "deterministic": "_get_deterministic_algorithms",
    "flash": "_get_flash_sdp_enabled",
    "efficient": "_get_mem_efficient_sdp_enabled",
    "math": "_get_math_sdp_enabled",
    "cudnn": "_get_cudnn_sdp_enabled",
}
"""What a program may set at any time, and torch's candidates go by."""


@functools.cache
def _getters() -> dict[str, Callable[[], Any]]:
    found = {
        name: getattr(torch._C, inner)
        for name, inner in _SETTINGS.items()
        if hasattr(torch._C, inner)
    }
    if hasattr(
        torch._C, "_get_fp32_precision_getter"
    ):  # since 2.9; the older one raises where the newer interface was used
        found["tf32"] = lambda: (
            torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
        )  # not set is as good as "ieee"
    return found


def _settings() -> tuple[Hashable, ...]:
    values = (get() for get in _getters().values())
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)
