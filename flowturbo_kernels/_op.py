"""Op: one operation as a value, i.e. its reference, its checks and its example inputs, under one name in OPS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Make(Protocol):
    """Makes one random tensor of the wanted shape, in the dtype and on the device that a test or a benchmark asks for."""

    def __call__(self, *shape: int) -> Tensor: ...


class Op(Generic[P, R]):
    """A checked call of `reference`. Its docstring is the contract; its reference is the meaning of every backend.

    reference: plain torch. It widens with torch.promote_types(dtype, float32), so that float64 inputs give a float64 truth.
    check: raises ValueError or TypeError, naming the argument, for inputs that no backend may read.
    example: make -> the argument tuples that tests and benchmarks walk.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        check: Callable[P, None],
        example: Callable[[Make], Iterable[tuple[Any, ...]]],
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.check = check
        self.example = example

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        self.check(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.name}>"


OPS: dict[str, Op[..., Any]] = {}


def op(
    *,
    check: Callable[P, None],
    example: Callable[[Make], Iterable[tuple[Any, ...]]],
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: turns a reference into an Op and enters it in OPS."""

    def register(reference: Callable[P, R]) -> Op[P, R]:
        made = Op(reference, check, example)
        OPS[made.name] = made
        return made

    return register


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype in which an op computes: float32, or float64 if an input is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def expect_shape(op_name: str, argument: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """ValueError unless `tensor` has the shape `expected`; None stands for any size."""
    shape = tuple(tensor.shape)
    same = len(shape) == len(expected) and all(e is None or e == s for e, s in zip(expected, shape, strict=True))
    if not same:
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op_name}: {argument} must have shape ({want}), got {shape}")


def expect_floating(op_name: str, **tensors: Tensor) -> None:
    """TypeError unless all tensors are floating point; ValueError unless they share a device."""
    device = None
    for argument, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op_name}: {argument} must be floating point, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op_name}: all tensors must be on one device, got {argument} on {tensor.device} beside {device}")
        device = tensor.device


def expect_one_dtype(op_name: str, **tensors: Tensor) -> None:
    """TypeError unless all tensors have the first one's dtype; under autocast, which casts them, anything goes."""
    (first, like), *others = tensors.items()
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return
    for argument, tensor in others:
        if tensor.dtype != like.dtype:
            raise TypeError(f"{op_name}: {argument} must have the dtype of {first}, {like.dtype}, got {tensor.dtype}")
