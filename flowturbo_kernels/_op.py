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
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _cuda, _triton, _tune
from ._tune import Candidates, form
from .arguments import Make, tensors

P = ParamSpec("P")
R = TypeVar("R")


class BackendError(RuntimeError):
    """A backend requested by name can't run here, or can't take these arguments."""


class Backend(NamedTuple):
    """One implementation of an operation.

    unsupported: arguments -> why it can't take them, or None. candidates: arguments -> what it
    chooses the fastest of, where it has several; of an operation with several backends these
    return its result, and their names begin with the backend's or are "torch".
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    candidates: Callable[..., Candidates] | None = None


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
    backends: see `backend`. Where several can take the arguments, "auto" takes the fastest as
        measured, and the first of them where nothing may be measured.
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
        self.on_cpu: Callable[..., R] | None = None
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
        candidates: Callable[..., Candidates] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: registers a backend. Its function takes all arguments by position."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(run, unsupported, candidates)
            return run

        return register

    def cpu_bfloat16(self, run: Callable[..., R]) -> Callable[..., R]:
        """Decorator: registers what "auto" runs on the CPU for tensors that are all bfloat16, as
        exact as the reference. Its function takes all arguments, checked, by position.
        """
        self.on_cpu = run
        return run

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
        if _reference_only(positional):
            return self.reference(*args, **kwargs)
        return self.library(*(self.lower(*positional) if self.lower else positional))  # type: ignore[return-value]

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _checks_skipped.get():
            self.check(*args, **kwargs)
        name = requested_backend()
        if (
            not self.backends
            or name == "reference"
            or (name == "auto" and args and not getattr(args[0], "is_cuda", True))
        ):
            # the shortest path: on the CPU small models feel every microsecond
            if self.on_cpu and name == "auto" and args[0].dtype == torch.bfloat16:  # type: ignore[attr-defined]
                positional = self._positional(args, kwargs)
                if self._bfloat16_only(positional):
                    return self.on_cpu(*positional)
            return self.reference(*args, **kwargs)
        positional = self._positional(args, kwargs)
        if _reference_only(positional):
            return self.reference(*args, **kwargs)
        return self._run(*positional)

    def why(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, dict[str, str]]:
        """Which backend these arguments get, and why not each other one that was considered.

        Where there are several candidates and the fastest is known: that one's name, the backend's
        or "torch" or "triton" and its tile.
        """
        positional = self._positional(args, kwargs)
        reason = _reference_only(positional)
        if reason:
            return "reference", dict.fromkeys(self.backends, reason)
        able, refused = self._choose(positional)
        if requested_backend() == "auto" and self._bfloat16_only(positional):
            return "cpu", refused
        if not able:
            return "reference", refused
        candidates = self._candidates(able, positional)
        known = candidates.known_fastest() if candidates else None
        chosen = known or next(iter(able))
        why = "not the fastest when measured" if known else "not measured yet at these sizes"
        others = [name for name in able if chosen.split()[0] != name and len(able) > 1]
        return chosen, refused | dict.fromkeys(others, why)

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in order, with defaults; `check`, of the same signature, has refused
        unknown names.
        """
        return args + tuple(
            kwargs.get(name, default) for name, default in self._parameters[len(args) :]
        )

    def _bfloat16_only(self, args: tuple[Any, ...]) -> bool:
        """Whether `on_cpu` takes these arguments."""
        return (
            self.on_cpu is not None
            and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors(args))
            and not _reference_only(args)
        )

    def _choose(self, args: tuple[Any, ...]) -> tuple[dict[str, Backend], dict[str, str]]:
        """The backends that can take these arguments, and why each other one that was asked can't.
        No backend: the reference runs.
        """
        name, device = requested_backend(), next(tensors(args)).device
        able: dict[str, Backend] = {}
        refused: dict[str, str] = {}
        if name == "reference" or (name == "auto" and device.type != "cuda"):
            return able, {} if name == "reference" else dict.fromkeys(
                self.backends, f"tensors are on the {device.type}"
            )
        unsupported = _unsupported_tensor(args)
        for candidate, backend in self.backends.items():
            if name not in ("auto", candidate):
                continue
            reason = unavailable(candidate, device) or unsupported
            reason = reason or backend.unsupported(*args)
            if reason is None:
                able[candidate] = backend
            else:
                refused[candidate] = reason
        if name in refused:
            raise BackendError(f"{self.name}: {name} was asked for, but: {refused[name]}")
        return able, refused

    def _candidates(self, able: dict[str, Backend], args: tuple[Any, ...]) -> Candidates | None:
        """All ways of these backends, as one choice; None where there is but one."""
        if len(able) == 1:
            (backend,) = able.values()
            return backend.candidates(*args) if backend.candidates else None
        functions: dict[str, Callable[..., Any]] = {}
        for name, backend in able.items():
            if backend.candidates is None:
                functions[name] = functools.partial(backend.run, *args)
            else:
                own = backend.candidates(*args)
                functions |= {n: functools.partial(f, *own.cold) for n, f in own.functions.items()}
        return Candidates((self.name, *map(_matters, args)), functions, next(tensors(args)).device)

    def _run(self, *args: Any) -> R:
        device = next(tensors(args)).device
        if len(self.backends) > 1 and device.type == "cuda" and requested_backend() == "auto":
            known = _tune.recalled(device, (self.name, *map(_matters, args)))
            if known:  # asking the backends again would take longer than a launch
                return self._run_on(device, self.backends[known].run, args)
        able, _ = self._choose(args)
        if not able:
            return self.reference(*args)  # type: ignore[call-arg, arg-type]
        if len(able) == 1:
            (backend,) = able.values()
            return self._run_on(device, backend.run, args)
        return self._run_on(device, functools.partial(self._run_fastest, able), args)

    def _run_fastest(self, able: dict[str, Backend], *args: Any) -> R:
        candidates = self._candidates(able, args)
        assert candidates is not None
        result = candidates.run()
        if candidates.functions.keys() == able.keys():  # none of torch's, so no setting matters
            _tune.shorten(candidates)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def _run_on(device: torch.device, run: Callable[..., R], args: tuple[Any, ...]) -> R:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run(*args)
        return run(*args)

    def __repr__(self) -> str:
        return f"<op {self.name}>"


# The profiler links a kernel to the innermost function around its launch. Ranges of torch's own
# record_function do not count: they are a user's annotations, which kernels are not linked to.
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
    """Decorator: turns a reference into an Op and adds it to OPS."""

    def register(reference: Callable[P, R]) -> Op[P, R]:
        operation = Op(reference, check, example, schema, lower, memory_format)
        OPS[operation.name] = operation
        return operation

    return register


BACKENDS = ("auto", "reference", "triton", "cuda")
_backend: ContextVar[str | None] = ContextVar("flowturbo_backend", default=None)


def requested_backend() -> str:
    """The backend set by `use_backend`, else by the variable FLOWTURBO_BACKEND, else "auto"."""
    return _backend.get() or _backend_of_environment()


def _backend_of_environment() -> str:
    return _valid("FLOWTURBO_BACKEND", os.environ.get("FLOWTURBO_BACKEND") or "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operations on one backend: "reference" (plain torch), "triton", "cuda", or "auto", as if
    none were named.

    An operation that has the named backend and can't run on it raises BackendError; one that has
    none of that name runs its reference, as all do where gradients are needed and under autocast.
    ValueError for another name.
    """
    token = _backend.set(_backend_of_environment() if _valid("backend", name) == "auto" else name)
    try:
        yield
    finally:
        _backend.reset(token)


_checks_skipped = ContextVar("flowturbo_checks_skipped", default=False)


@contextmanager
def skip_checks() -> Iterator[None]:
    """Operations inside do not check their arguments, for callers who build them all themselves:
    checks take a tenth of a small model's time on the CPU.
    """
    token = _checks_skipped.set(True)
    try:
        yield
    finally:
        _checks_skipped.reset(token)


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


def _unsupported_tensor(args: tuple[Any, ...]) -> str | None:
    """Why no kernel can take one of these tensors, or None."""
    for tensor in tensors(args):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            return f"{tensor.dtype} is none of float32, float16, bfloat16"
        if not tensor.numel():
            return "a tensor is empty"
    return None


def _reference_only(args: tuple[Any, ...]) -> str | None:
    """Why the reference must run whatever the requested backend, or None."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors(args)):
        return "forward only, and gradients are asked for"
    kind = next(tensors(args)).device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "under autocast torch chooses the dtypes"
    return None


def _matters(value: Any) -> Any:
    """What matters of an argument to a choice: kernels are not specialised on floats."""
    if isinstance(value, Tensor):
        return form(value)
    if isinstance(value, list | tuple):
        return tuple(map(_matters, value))
    return "float" if isinstance(value, float) else value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) else tuple(change(v) for v in value)
