"""Op: one operation as a value, i.e. its reference, checks, examples and backends, under one name
in OPS; the choice of backend.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from . import _cuda, _triton
from ._tune import Ways

P = ParamSpec("P")
R = TypeVar("R")


class Make(Protocol):
    """Makes one random tensor of the wanted shape, in the dtype and on the device that a test or a
    benchmark asks for.
    """

    def __call__(self, *shape: int) -> Tensor: ...


class BackendError(RuntimeError):
    """A backend was asked for by name and can't run here, or not these arguments."""


class Backend(NamedTuple):
    """One way of running an operation. unsupported: the reason why it can't take some arguments, or
    None.

    ways: where it takes the fastest of several, what it chooses among.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    ways: Callable[..., Ways] | None = None


class Op(Generic[P, R]):
    """A checked call of one of several backends. Its docstring is the contract; its reference is
    the meaning of every backend.

    reference: plain torch. It widens with torch.promote_types(dtype, float32), so that float64
        inputs give a float64 truth.
    check: raises ValueError or TypeError, naming the argument, for inputs that no backend may read.
    example: make -> the argument tuples that tests and benchmarks walk.
    schema: of the torch.library operator flowturbo::<name>, as which the op appears under
        torch.compile and torch.export.
    lower: the op's arguments -> the schema's, where they differ. memory_format: of the operator's
        results.
    backends: in order of preference; see `backend`.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        check: Callable[P, None],
        example: Callable[[Make], Iterable[tuple[Any, ...]]],
        schema: str,
        lower: Callable[..., tuple[Any, ...]] | None,
        memory_format: torch.memory_format,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.check = check
        self.example = example
        self.lower = lower
        self.backends: dict[str, Backend] = {}
        self._parameters = [
            (p.name, p.default) for p in inspect.signature(reference).parameters.values()
        ]

        def dense(run: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: _mapped(
                run(*args), lambda t: t.contiguous(memory_format=memory_format)
            )

        self.library = torch.library.custom_op(
            f"flowturbo::{self.name}", dense(self._run), mutates_args=(), schema=schema
        )
        self.library.register_fake(dense(reference))

    def backend(
        self,
        name: str,
        unsupported: Callable[..., str | None],
        ways: Callable[..., Ways] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator of a function that takes checked, defaulted, positional arguments, and is tried
        after those before it.
        """

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(run, unsupported, ways)
            return run

        return register

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        if torch.autograd.profiler._is_profiler_enabled:
            with _recorded(f"flowturbo::{self.name}"):
                return self._call(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _compiled(self, *args: P.args, **kwargs: P.kwargs) -> R:
        self.check(*args, **kwargs)
        positional = self._positional(args, kwargs)
        if _for_torch(positional):
            return self.reference(*args, **kwargs)
        return self.library(*(self.lower(*positional) if self.lower else positional))  # type: ignore[return-value]

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _trusted.get():
            self.check(*args, **kwargs)
        name = requested_backend()
        if (
            not self.backends
            or name == "reference"
            or (name == "auto" and args and not getattr(args[0], "is_cuda", True))
        ):
            return self.reference(
                *args, **kwargs
            )  # by the shortest way: on the CPU small models feel every microsecond
        positional = self._positional(args, kwargs)
        return self.reference(*args, **kwargs) if _for_torch(positional) else self._run(*positional)

    def why(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, dict[str, str]]:
        """Which backend these arguments get, and why each one before it does not.

        Where it takes the fastest of several ways, and has measured it: that one's name, "torch" or
        "triton" and its tile.
        """
        positional = self._positional(args, kwargs)
        reason = _for_torch(positional)
        if reason:
            return "reference", dict.fromkeys(self.backends, reason)
        name, refused = self._choose(positional)
        ways = self.backends[name].ways if name in self.backends else None
        return (ways(*positional).chosen() if ways else None) or name, refused

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in order, defaults filled in; `check`, of the same signature, has refused
        names that are none.
        """
        return args + tuple(
            kwargs.get(name, default) for name, default in self._parameters[len(args) :]
        )

    def _choose(self, args: tuple[Any, ...]) -> tuple[str, dict[str, str]]:
        name, device = requested_backend(), next(tensors(args)).device
        refused: dict[str, str] = {}
        if name == "reference" or (name == "auto" and device.type != "cuda"):
            return "reference", {} if name == "reference" else dict.fromkeys(
                self.backends, f"tensors are on the {device.type}"
            )
        for candidate, backend in self.backends.items():
            if name not in ("auto", candidate):
                continue
            reason = (
                unavailable(candidate, device) or _wide_or_empty(args) or backend.unsupported(*args)
            )
            if reason is None:
                return candidate, refused
            refused[candidate] = reason
        if name in refused:
            raise BackendError(f"{self.name}: {name} was asked for, but: {refused[name]}")
        return "reference", refused

    def _run(self, *args: Any) -> R:
        chosen, _ = self._choose(args)
        if chosen == "reference":
            return self.reference(*args)  # type: ignore[call-arg, arg-type]
        device = next(tensors(args)).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.backends[chosen].run(*args)
        return self.backends[chosen].run(*args)

    def __repr__(self) -> str:
        return f"<op {self.name}>"


# The profiler links a kernel to the innermost function that launched it, as which torch's own
# record_function does not count: it marks a user's range, which no kernel is linked to.
_recorded = getattr(torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function)

OPS: dict[str, Op[..., Any]] = {}


def op(
    *,
    check: Callable[P, None],
    example: Callable[[Make], Iterable[tuple[Any, ...]]],
    schema: str,
    lower: Callable[..., tuple[Any, ...]] | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: turns a reference into an Op and enters it in OPS."""

    def register(reference: Callable[P, R]) -> Op[P, R]:
        made = Op(reference, check, example, schema, lower, memory_format)
        OPS[made.name] = made
        return made

    return register


BACKENDS = ("auto", "reference", "triton", "cuda")
_wanted: ContextVar[str | None] = ContextVar("flowturbo_backend", default=None)


def requested_backend() -> str:
    """The backend asked for: by `use_backend`, else by the environment's FLOWTURBO_BACKEND, else
    "auto".
    """
    return _wanted.get() or _environments()


def _environments() -> str:
    return _valid("FLOWTURBO_BACKEND", os.environ.get("FLOWTURBO_BACKEND") or "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operations on one backend: "reference" (plain torch), "triton", "cuda", or "auto", as if
    none were named.

    An operation that has the named backend and can't run on it raises BackendError; one that has
    none of that name runs its reference, as all do where gradients are needed and under autocast.
    ValueError for another name.
    """
    token = _wanted.set(_environments() if _valid("backend", name) == "auto" else name)
    try:
        yield
    finally:
        _wanted.reset(token)


_trusted = ContextVar("flowturbo_trusted", default=False)


@contextmanager
def skip_checks() -> Iterator[None]:
    """Operations inside do not check their arguments: for callers who have made all of them
    themselves, of shapes that fit.

    Checks take a tenth of a small model's time on the CPU.
    """
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def _valid(argument: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why this machine can't run the backend on that device, or None."""
    if backend == "triton":
        return _triton.unavailable(device)
    if backend == "cuda":
        return _cuda.unavailable(device)
    return None


def _wide_or_empty(args: tuple[Any, ...]) -> str | None:
    for tensor in tensors(args):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            return f"{tensor.dtype} is none of float32, float16, bfloat16"
        if not tensor.numel():
            return "a tensor is empty"
    return None


def _for_torch(args: tuple[Any, ...]) -> str | None:
    """Why the reference must run whatever was asked for, or None."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors(args)):
        return "forward only, and gradients are asked for"
    kind = next(tensors(args)).device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "under autocast torch chooses the dtypes"
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) else tuple(change(v) for v in value)


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype in which an op computes: float32, or float64 if an input is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def expect_shape(
    op_name: str, argument: str, tensor: Tensor, expected: tuple[int | None, ...]
) -> None:
    """ValueError unless `tensor` has the shape `expected`; None stands for any size."""
    shape = tensor.shape
    if shape == expected:  # mostly, and quickly: on the CPU small models feel every microsecond
        return
    if len(shape) != len(expected) or any(
        e is not None and e != s for e, s in zip(expected, shape, strict=True)
    ):
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op_name}: {argument} must have shape ({want}), got {tuple(shape)}")


def expect_floating(op_name: str, **tensors: Tensor) -> None:
    """TypeError unless all tensors are floating point; ValueError unless they share a device."""
    device = None
    for argument, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op_name}: {argument} must be floating point, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(
                f"{op_name}: all tensors must be on one device, got {argument} on {tensor.device} "
                f"beside {device}"
            )
        device = tensor.device


def expect_one_dtype(op_name: str, **tensors: Tensor) -> None:
    """TypeError unless all tensors have the first one's dtype; under autocast, which casts them,
    anything goes.
    """
    first, like = next(iter(tensors.items()))
    dtype = like.dtype
    for argument, tensor in tensors.items():
        if tensor.dtype != dtype:
            kind = like.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                return
            raise TypeError(
                f"{op_name}: {argument} must have the dtype of {first}, {dtype}, got {tensor.dtype}"
            )
