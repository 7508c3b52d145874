"""Names of classes: which a model's file may hold, and which class a name means."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..checks import listed


def checked_names(names: Any, num_classes: int) -> tuple[str, ...]:
    """The names of all classes, by number, that a file may hold.

    Raises TypeError or ValueError for names that are not as many as classes, distinct and texts
    of one line, and for those that would be read as class numbers.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        raise TypeError(f"class_names must be a list of texts, got {names!r:.80}")
    for k, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"class_names must be texts, got {name!r:.80} for class {k}")
        if reason := _unusable(name):
            raise ValueError(f"class_names must be {reason}, got {name!r:.80} for class {k}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"class_names must be distinct, got {listed(repeated, name=repr)} more than once"
        )
    if len(names) != num_classes:
        raise ValueError(f"class_names must be {num_classes}, one for each class, got {len(names)}")
    return tuple(map(str, names))


def _unusable(name: str) -> str | None:
    """What a name must be, and is not, or None."""
    if not name or name != name.strip():
        return "texts without spaces at their ends"
    # Control characters, and lone surrogates, which no terminal can print.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "texts of one line"
    try:
        int(name)
    except ValueError:
        return None
    return "other than numbers, which are read as class numbers"
