"""The fastest of several candidates for an operation, measured once per device, shape and dtype,
and kept on disk.
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
from ._library import LibraryError, LibraryKernel
from ._measure import Timing, rotating, timing

_lock = threading.RLock()
"""Entered again where a candidate is made of operations that have candidates of their own."""
_in_memory: dict[Hashable, str] = {}
"""The fastest by key, in this process."""
_on_disk: dict[torch.device, dict[str, _choices.Entry]] = {}
"""What this process last read from disk."""


class Candidates(NamedTuple):
    """Several functions that run one operation on the same arguments.

    question: the operation, and all that matters of its arguments; of a tensor its `form`.
    functions: by name, of the cold tensors; the first is the default.
    cold: the weights. Between two uses of a weight a plan reads hundreds of megabytes, so
    candidates are timed on copies in turn. Other tensors are bound in the functions and stay the
    same: a plan's previous kernel has just written them.
    """

    question: tuple[Hashable, ...]
    functions: Mapping[str, Callable[..., Any]]
    device: torch.device
    cold: tuple[Tensor, ...] = ()

    def run(self) -> Any:
        """The result of the fastest. Where that is a library's, and fails or was not compiled
        before this capture: of the fastest other one.
        """
        name = fastest(self)
        try:
            return self.functions[name](*self.cold)
        except LibraryError:
            if len(self.functions) == 1:
                raise
            return self._without(name).run()

    def _without(self, name: str) -> Candidates:
        return self._replace(functions={k: f for k, f in self.functions.items() if k != name})

    def known_fastest(self) -> str | None:
        """The name of the fastest if it was measured before, here or by another process; nothing is
        measured now.
        """
        measurable = self.device.type == "cuda" and len(self.functions) > 1
        name = _known(self, _key(self)) if measurable else None
        run = None if name is None else self.functions[name]
        if name is not None and isinstance(run, LibraryKernel) and run.failed():
            return self._without(name).known_fastest()
        return name


def fastest(candidates: Candidates) -> str:
    """The name of the candidate that runs fastest on the device.

    The default, with nothing measured or kept, off CUDA and while a CUDA graph is being captured,
    which forbids measuring. A candidate that fails is taken only if all do: then the default, whose
    error says why. Disk gets only what will hold in other processes as well: not a choice where a
    candidate failed for a passing reason, where timings varied much, or where memory did not
    suffice for rotating the weights. Those hold in this process alone.
    """
    default = next(iter(candidates.functions))
    if candidates.device.type != "cuda" or len(candidates.functions) == 1:
        return default
    key = _key(candidates)
    choice = _known(candidates, key)
    if choice is not None:
        return choice
    if torch.cuda.is_current_stream_capturing():
        return default
    with _lock:  # another thread, or process, may have measured it meanwhile
        choice = _in_memory[key] = _known(candidates, key, reread=True) or _measure(candidates)
    return choice


def shorten(candidates: Candidates) -> None:
    """Remember the fastest, if it is known, by the question alone: for candidates that no setting
    matters to, where another call with this question has the same ones.
    """
    if (known := candidates.known_fastest()) is not None:
        _in_memory[candidates.device, candidates.question] = known


def recalled(device: torch.device, question: tuple[Hashable, ...]) -> str | None:
    """What `shorten` remembers."""
    return _in_memory.get((device, question))


def _key(candidates: Candidates) -> Hashable:
    return candidates.device, candidates.question, tuple(candidates.functions), _settings()


def _disk_key(candidates: Candidates) -> str:
    """The key on disk, which names the candidates: others make another question."""
    names = hashlib.sha256("\n".join(candidates.functions).encode()).hexdigest()[:8]
    count = len(candidates.functions)
    settings = (f"{name} {value}" for name, value in zip(_getters(), _settings(), strict=True))
    question = " ".join(map(str, candidates.question))
    return f"{question} | {count} candidates {names} | {', '.join(settings)}"


def _known(candidates: Candidates, key: Hashable, reread: bool = False) -> str | None:
    """The fastest as this process knows it from memory or disk. reread: read the disk again."""
    if key in _in_memory:
        return _in_memory[key]
    if reread or candidates.device not in _on_disk:
        _on_disk[candidates.device] = _choices.read(_choices.facts(candidates.device))
    choice = _on_disk[candidates.device].get(_disk_key(candidates), {}).get("fastest")
    if choice in candidates.functions:
        _in_memory[key] = str(choice)
    return _in_memory.get(key)


def _measure(candidates: Candidates) -> str:
    """The fastest, written to disk if it will hold."""
    timings: dict[str, Timing] = {}
    cannot: dict[str, str] = {}
    lasting = True
    with rotating(candidates.cold, candidates.device) as (sets, enough):
        for name, run in candidates.functions.items():
            try:
                timings[name] = timing(run, sets, candidates.device)
            except Exception as error:  # whatever a compiler or a library raises for a shape
                cannot[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                lasting &= _lasting(error)
    if not timings:
        return next(iter(candidates.functions))
    choice = min(timings, key=lambda name: timings[name].seconds)
    if not (enough and lasting and all(timing.steady for timing in timings.values())):
        return choice
    us = {name: round(1e6 * timing.seconds, 3) for name, timing in timings.items()}
    entry = {"fastest": choice, "us": us, "cannot": cannot}
    _on_disk[candidates.device] = _choices.add(
        _choices.facts(candidates.device), _disk_key(candidates), entry, candidates.functions
    )
    return str(_on_disk[candidates.device][_disk_key(candidates)]["fastest"])


_LASTING = {
    "OutOfResources",
    "CompilationError",
    "WrongResult",
    "BackendError",
    "NotImplementedError",
}
"""Errors of Triton, ours and Python's, by name, since Triton may not be installed."""


def _lasting(error: Exception) -> bool:
    """Whether a candidate will fail in the same way under this key in every process.

    So it is where its code does not compile or needs what such a device does not have, or where its
    library says that it can't. Anything else counts as passing: lack of memory, and all other
    errors of CUDA.
    """
    if any(kind.__name__ in _LASTING for kind in type(error).__mro__):
        return True
    return (
        isinstance(error, RuntimeError)
        and re.search(r"(not|only).supported|unsupported", str(error), re.IGNORECASE) is not None
    )


# The key is built at every call, so it holds plain values; they become text only for the disk.


def form(tensor: Tensor) -> tuple[Hashable, ...]:
    """What matters of a tensor: dtype, shape, and those properties of its strides and address that
    kernels are specialised on.
    """
    return (
        tensor.dtype,
        _layout(tensor.shape, tensor.stride()),
        "" if tensor.data_ptr() % 16 == 0 else "unaligned",
    )


@functools.lru_cache(4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    """As 512x1152; where it is not dense also each axis's kind of stride: 1, a multiple of 16, or
    any other.
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
    # name in the key on disk: torch's private getter, which is quick, and does not raise where the
    # value was set by another interface
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
"""Settings that a program may change at any time, and that torch's candidates depend on."""


@functools.cache
def _getters() -> dict[str, Callable[[], Any]]:
    getters = {
        name: getattr(torch._C, private)
        for name, private in _SETTINGS.items()
        if hasattr(torch._C, private)
    }
    # Since torch 2.9; the older getter raises where the newer interface was used.
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        getters["tf32"] = _tf32
    return getters


def _tf32() -> bool:
    return bool(torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32")  # unset is "ieee"


def _settings() -> tuple[Hashable, ...]:
    values = (get() for get in _getters().values())
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)
