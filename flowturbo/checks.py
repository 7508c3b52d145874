"""Checks of plain arguments, shared by everything that takes them from a user."""

from __future__ import annotations

import math
import operator


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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
