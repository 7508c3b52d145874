"""What the numbers of images, masks and latents mean: one rule for arrays and files.

Black is 0 in every type. White is

- True in bool, 255 in uint8, 65535 in uint16;
- in floating point 1, or 255 if a value is at least 2.

Values outside are refused, and so are other whole numbers, whose white is not known. Masks may also
hold 0 and 1 in any type; otherwise a mask chooses what is brighter than half of white.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Numbers = np.ndarray | Tensor


def kind_of(values: Numbers) -> str:
    """The name of an array's type, such as "uint16", whatever its byte order."""
    if isinstance(values, Tensor):
        return str(values.dtype).removeprefix("torch.")
    return values.dtype.name


def tensor_of(name: str, values: Any) -> Tensor:
    """An array or tensor of real numbers as a tensor that torch computes with.

    Arrays may have any strides and byte order, and be read-only; they are copied where torch asks
    for it. Unsigned numbers of 16 to 64 bits become int64, those beyond float64 become float64.
    name: of the argument, for messages. Raises TypeError for other objects and types, ValueError
    for whole numbers from 2**63 on.
    """
    if isinstance(values, np.ndarray):
        values = _from_array(name, values)
    elif not isinstance(values, Tensor):
        raise TypeError(f"{name} must be an array or a tensor, got {type(values).__name__}")
    if values.layout != torch.strided or values.is_nested or values.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, got one that is sparse, nested or packed")
    if values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        signed = values.to(torch.int64)
        if signed.numel() and signed.min() < 0:
            raise ValueError(f"{name} must be whole numbers below 2**63, got larger ones")
        return signed
    return values.float() if values.is_floating_point() and values.itemsize == 1 else values


def _from_array(name: str, values: np.ndarray) -> Tensor:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked one: fill it first")
    kind = values.dtype
    if kind.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got an array of {kind}")
    native = np.dtype(np.float64) if kind.itemsize > 8 else kind.newbyteorder("=")
    return torch.from_numpy(np.require(np.asarray(values), native, ["C", "A", "W"]))


def to_bytes(name: str, values: Tensor, kind: str) -> Tensor:
    """Pixels of any scale -> uint8. kind: of the array that they come from, see `kind_of`.

    Raises TypeError for types without a scale, ValueError for values that are not of it.
    """
    if kind == "uint8":
        return values
    if kind == "bool":
        return values.to(torch.uint8) * 255
    if kind == "uint16":
        return narrowed(name, values).to(torch.uint8)
    if values.is_floating_point():
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return (wide * (255 / white(name, wide))).round().to(torch.uint8)
    raise TypeError(
        f"{name} must be uint8, uint16, bool or floating point, got {kind}, of which it is not "
        "known what is white"
    )


def to_mask(name: str, values: Tensor, kind: str) -> Tensor:
    """A mask of any scale -> bool. Errors are those of `to_bytes`."""
    if kind == "bool":
        return values
    if values.is_floating_point():
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return wide > white(name, wide) / 2
    if not values.numel() or (values.min() >= 0 and values.max() <= 1):
        return values > 0
    return to_bytes(name, values, kind) > 127


def white(name: str, values: Tensor) -> float:
    """The white of floating-point values: 1 or 255.

    Raises ValueError for values that are of neither scale.
    """
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in them")
    low, high = (float(bound) for bound in values.aminmax()) if values.numel() else (0.0, 0.0)
    if low < 0 or 1 < high < 2 or high > 255:
        raise ValueError(
            f"{name} in floating point must be from 0 to 1, or from 0 to 255, got values from "
            f"{low:g} to {high:g}"
        )
    return 1.0 if high <= 1 else 255.0


def narrowed(name: str, values: Any) -> Any:
    """16 bits -> the upper 8 of them, as pillow narrows those of colour.

    values: an array or a tensor. ValueError if nothing but black would be left of them.
    """
    high = int(values.max()) if 0 not in values.shape else 0
    if 0 < high <= 255:
        raise ValueError(
            f"{name} has 16 bits, of which white is 65535, but no value above {high}, which would "
            "be black: store 8 bits as uint8"
        )
    return values >> 8


def refuse_pixels(name: str, latents: Tensor, advice: str) -> None:
    """ValueError for pixels given as latents or noise.

    Those have values of both signs, which pixels of 0 to 1 or 255 have not. Equal values, such as
    zeros, pass, and so do less than 64 of them.
    """
    if latents.numel() < 64:
        return
    low, high = (float(bound) for bound in latents.aminmax())
    if 0 <= low < high:
        raise ValueError(
            f"{name} must have values of both signs, got {latents.numel()} from {low:g} to "
            f"{high:g}, as pixels have: {advice}"
        )
