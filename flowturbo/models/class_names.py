"""Names of classes: which a model's file may hold, and which class a name means."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checks import listed

_NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")
_NEAR = 5
"""The most names that a message offers for one that is unknown."""


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
        if reason := unusable(name) or _number(name):
            raise ValueError(f"class_names must be {reason}, got {name!r:.80} for class {k}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"class_names must be distinct, got {listed(repeated, name=repr)} more than once"
        )
    if len(names) != num_classes:
        raise ValueError(f"class_names must be {num_classes}, one for each class, got {len(names)}")
    return tuple(map(str, names))


def usable_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """The names if a file may hold them, else None: folders of classes are often numbers."""
    try:
        return None if names is None else checked_names(names, num_classes)
    except ValueError:
        return None


def unusable(name: str) -> str | None:
    """What a name of anything must be, and this one is not, or None."""
    if not name or name != name.strip():
        return "texts that are not empty and have no spaces at their ends"
    # Control characters, separators of lines, and lone surrogates, which no terminal can print.
    if any(unicodedata.category(character) in _NOT_PRINTED for character in name):
        return "texts of one line"
    return None


def _number(name: str) -> str | None:
    try:
        int(name)
    except ValueError:
        return None
    return "other than numbers, which are read as class numbers"


def numbered(labels: Any, names: Sequence[str] | None) -> Any:
    """The labels with class numbers in place of names, and everything else as it is.

    labels: a label, or a list, tuple or array of them. names: of the model's classes, if known.
    Raises ValueError for an unknown name, with the near ones, and TypeError for a name if the
    model's classes have none.
    """
    if isinstance(labels, str):
        return numbered([labels], names)[0]
    if isinstance(labels, np.ndarray):
        items = labels.tolist() if labels.dtype.kind in "UOT" else None
        return numbered(items, names) if isinstance(items, str) or _has_names(items) else labels
    if not _has_names(labels):
        return labels
    if names is None:
        got = next(label for label in labels if isinstance(label, str))
        raise TypeError(
            "labels must be a class number or a list of them, since the model's classes have no "
            f"names, got {got!r}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    for label in labels:
        if isinstance(label, str) and label not in numbers:
            near = ", ".join(map(repr, _near(label, names)))
            raise ValueError(
                f"labels must be names or numbers of the model's classes, got {label!r}; "
                + (f"names near it are {near}; " if near else "")
                + f"model.class_names has all {len(names)}, and `flowturbo info --model FILE` "
                "lists them"
            )
    return [numbers[label] if isinstance(label, str) else label for label in labels]


def _has_names(labels: Any) -> bool:
    return isinstance(labels, list | tuple) and any(isinstance(label, str) for label in labels)


def _near(name: str, names: Sequence[str]) -> list[str]:
    """The names that were perhaps meant: those spelled alike, then those that contain it, or that
    it contains.
    """
    folded: dict[str, list[str]] = {}
    for known in names:
        folded.setdefault(known.casefold(), []).append(known)
    word = name.strip().casefold()
    alike = difflib.get_close_matches(word, folded, _NEAR)
    # A letter or digit alone is within nearly anything.
    within = [
        known
        for known in folded
        if min(len(word), len(known)) > 1 and (known in word or word in known)
    ]
    near = [known for key in dict.fromkeys([*alike, *within]) for known in folded[key]]
    return near[:_NEAR]
