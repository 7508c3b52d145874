"""Arguments of operations: examples of them, the tensors among them, the dtype to compute in, and
checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Make(Protocol):
    """Makes a random tensor of a shape; its dtype and device are the test's or the benchmark's."""

    def __call__(self, *shape: int) -> Tensor: ...


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, inside tuples and lists too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


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
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op_name}: {argument} must have shape ({sizes}), got {tuple(shape)}")


def expect_modulation(op_name: str, argument: str, tensor: Tensor, rows: int, width: int) -> None:
    """ValueError unless `tensor` (M, width) modulates that many rows; see `modulation_rows`."""
    half = tensor.ndim == 2 and rows % 2 == 0 and len(tensor) == rows // 2 + 1
    expect_shape(op_name, argument, tensor, (rows // 2 + 1 if half else rows, width))


def modulation_rows(tensor: Tensor, rows: int) -> Tensor:
    """A modulation (M, D) as a row for each of `rows`: M is that many, or, with both halves of
    guidance, N + 1, whose last row, of the null class, is that of the whole second half.
    """
    if len(tensor) == rows:
        return tensor
    if not rows:  # of no images there is the null class's row alone
        return tensor[:0]
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), -1)])


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
    any dtypes pass.
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


def expect_activation(op_name: str, activation: str | None) -> None:
    """ValueError unless there is none, or one that products have."""
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"{op_name}: activation must be None or 'gelu_tanh', got {activation!r}")
