"""Kernels of other packages as candidates: whether a package can be used, and its kernels, each
compiled and checked before anything relies on it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import re
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Check = Callable[..., tuple[Tensor, Tensor]]
"""(result, *cold) -> (some of the result, what it must be)."""
Key = tuple[Hashable, ...]
"""A kernel's name, and all that it is compiled or planned for."""

_TRIES = 3
"""After so many kernels that did not compile, and none that did, the compiler counts as broken."""
_compiling = threading.RLock()
"""One at a time: the compilers are not made for threads."""


class LibraryError(RuntimeError):
    """A library's kernel can't run now: another candidate does."""


class CompilationError(LibraryError):
    """It does not compile, or its launcher refuses the arguments."""


class WrongResult(LibraryError):
    """Its first result is not what the reference gives."""


class Library:
    """A package whose kernels are candidates where it is installed. Nothing of it is imported
    before `unavailable` is asked about a device that its kernels run on.

    distribution, needed: its name and least version, on the package index.
    load: imports it -> what kernels are called through.
    lacks: a device's capability -> why kernels don't run there, or None.
    """

    def __init__(
        self,
        distribution: str,
        needed: str,
        load: Callable[[], Any],
        lacks: Callable[[tuple[int, int]], str | None],
    ) -> None:
        self.distribution, self.needed = distribution, needed
        self._load, self._lacks = load, lacks
        self.forget()

    def forget(self) -> None:
        """As a new process begins."""
        self.loaded: Any = None
        self.ready: set[Key] = set()
        self.failures: dict[Key, str] = {}
        self._problem: str | None = None
        self._installed = functools.cache(self._wrong_version)

    def unavailable(self, device: torch.device) -> str | None:
        """Why its kernels are no candidates on that device, or None."""
        reason = self._installed()
        if not reason and device.type != "cuda":
            return f"tensors are on the {device.type}"
        if torch.version.hip:
            return "it is for NVIDIA's GPUs"
        reason = reason or self._lacks(_capability(device)) or self._problem
        if reason or self.loaded is not None:
            return reason
        if torch.cuda.is_current_stream_capturing():
            return "it was not tried before this CUDA graph's capture"
        with _compiling:
            try:
                self.loaded = self._load()
            except Exception as error:  # whatever a package raises at import
                self._problem = f"it can't be imported ({first_line(error)})"
        return self._problem

    def describe(self, device: torch.device) -> str:
        """Its version, or why it is not used; and which of its kernels failed in this process."""
        reason, found = self.unavailable(device), version(self.distribution)
        if reason:
            return f"{found}, not used: {reason}" if found else f"not used: {reason}"
        failed = "; ".join(f"{key[0]}: {why}" for key, why in self.failures.items())
        return f"{found} (failed: {failed})" if failed else str(found)

    def _wrong_version(self) -> str | None:
        found = version(self.distribution)
        if found is None:
            return "it is not installed (extra: hopper)"
        if _ordered(found) < _ordered(self.needed):
            return f"{self.distribution} {found} is too old: {self.needed} or later is needed"
        return None

    def failed(self, key: Key, error: Exception) -> None:
        """Not to be tried again in this process."""
        self.failures[key] = first_line(error)
        if not self.ready and len(self.failures) >= _TRIES:
            self._problem = (
                f"its first {len(self.failures)} kernels failed, the last with {first_line(error)}"
            )


class LibraryKernel:
    """One kernel of a library for one question, as a candidate: a function of the cold tensors.

    Its first call compiles it, fills the result with NaN beforehand, and compares what comes with
    the reference: no such kernel is trusted unseen. `ready` says whether that has happened; before,
    a capture can't have it. What goes wrong is raised as a LibraryError, and does not come again.

    empty: an uninitialised result. launch: (result, *cold), into the result.
    check, bound: what the first result is compared with, by which relative error in the 2-norm.
    """

    __slots__ = ("bound", "check", "empty", "key", "launch", "library")

    def __init__(
        self,
        library: Library,
        key: Key,
        empty: Callable[[], Tensor],
        launch: Callable[..., Any],
        check: Check,
        bound: float,
    ) -> None:
        self.library, self.key, self.empty = library, key, empty
        self.launch, self.check, self.bound = launch, check, bound

    def ready(self) -> bool:
        return self.key in self.library.ready

    def failed(self) -> bool:
        return self.key in self.library.failures

    def __call__(self, *cold: Tensor) -> Tensor:
        if self.failed():
            raise LibraryError(self.library.failures[self.key])
        if not self.ready():
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise LibraryError("it was not compiled before this CUDA graph's capture")
            return self._first(cold)
        result = self.empty()
        with self._noted(LibraryError):
            self.launch(result, *cold)
        return result

    def _first(self, cold: tuple[Tensor, ...]) -> Tensor:
        with _compiling:
            result = self.empty()
            # NaN in every float type: memory may still hold another candidate's right result.
            result.view(torch.uint8).fill_(0xFF)
            with self._noted(CompilationError):
                self.launch(result, *cold)
            with self._noted(WrongResult):
                got, expected = self.check(result, *cold)
                error = relative_error(got, expected)
                if not error <= self.bound:
                    raise WrongResult(f"its result is off by {error:.3g}")
            self.library.ready.add(self.key)
        return result

    @contextmanager
    def _noted(self, kind: type[LibraryError]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if _lacks_memory(error):
                raise
            self.library.failed(self.key, error)
            if isinstance(error, LibraryError):
                raise
            kind = LibraryError if _of_the_device(error) else kind
            raise kind(f"{self.library.distribution}: {first_line(error)}") from error


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; 0 where nothing finite is expected, which nobody can check."""
    a, e = got.to(torch.float32), expected.to(torch.float32)
    norm, gap = torch.stack([e.norm(), (a - e).norm()]).tolist()
    if not math.isfinite(norm):
        return 0.0
    return gap / norm if norm else (0.0 if gap == 0 else math.inf)


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ordered(text: str) -> tuple[float, ...]:
    """A version as numbers that compare as versions do: a beta comes before its release."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:(a|b|rc)(\d+))?", text)
    if match is None:
        return ()
    *numbers, stage, count = match.groups(default="")
    stages = {"a": 0, "b": 1, "rc": 2, "": 3}
    return (*(float(n or 0) for n in numbers), stages[stage], float(count or 0))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "out of memory" in str(error).lower()
    )


def _of_the_device(error: Exception) -> bool:
    """Whether it may be gone in another process: an error of CUDA or of the file system."""
    return (
        isinstance(error, OSError)
        or "cuda" in type(error).__name__.lower()
        or "cuda error" in str(error).lower()
    )
