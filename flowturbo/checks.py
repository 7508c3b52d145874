"""Checks of numbers that users pass, and lists for messages.

Each check returns the value in its plain Python type. All raise TypeError for the wrong type and
ValueError for the wrong value, naming the argument.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MOST_NAMED = 8
"""The most things that a message names, unless it says otherwise."""


def natural(name: str, value: int) -> int:
    """An integer from 0 to 2**63 - 1."""
    number = whole(name, value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {value}")
    return number


def positive(name: str, value: int) -> int:
    """An integer of at least 1."""
    number = whole(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number


def whole(name: str, value: int) -> int:
    """An integer of any sign, NumPy integers included, but no bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def finite(name: str, value: float) -> float:
    """A number that is neither NaN nor infinite."""
    # NumPy's scalars are numbers.Real too.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def numbers_of(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """A list, tuple, array or tensor of numbers.

    NaN and infinity pass: the caller can say at which index they are.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    # A tensor's items are tensors.
    given: Iterable[Any] = values
    items = [v.item() if getattr(v, "ndim", None) == 0 else v for v in given]
    for i, value in enumerate(items):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a list of numbers, got {name}[{i}] = {value!r}")
    try:
        return tuple(map(float, items))
    except OverflowError:  # an integer of hundreds of digits
        raise ValueError(f"{name} must be a list of finite numbers, got a larger one") from None


def listed(items: Sequence[Any], most: int = MOST_NAMED, name: Callable[[Any], str] = str) -> str:
    """The first few, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(name, items[:most])) + more
