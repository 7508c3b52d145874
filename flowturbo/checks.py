"""Checks of plain arguments, shared by everything that takes them from a user."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable


def natural(name: str, value: int) -> int:
    """A whole number from 0 to 2**63 - 1."""
    number = whole(name, value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {value}")
    return number


def positive(name: str, value: int) -> int:
    """A whole number from 1 on."""
    number = whole(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number


def whole(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def finite(name: str, value: float) -> float:
    """A number that is neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(
        value, numbers.Real
    ):  # NumPy's scalars are Real too
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def numbers_of(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """A list, tuple or array of numbers; NaN and infinity pass, for the caller to say where they
    stand.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    found = list(values)
    for i, value in enumerate(found):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a list of numbers, got {name}[{i}] = {value!r}")
    return tuple(map(float, found))
