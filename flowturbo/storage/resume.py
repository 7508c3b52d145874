"""Results that resume: settings are stored, compared, and a difference is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import write_text


class Keep:
    """What has been worked out already, in a file: it is worked out once, by name, even if the
    process is killed in between.
    """

    def __init__(self, path: Path, results: dict[str, Any]) -> None:
        self.path, self.results = path, results

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """A value of JSON's types."""
        kept = self.results["kept"]
        if name not in kept:
            kept[name] = json.loads(json.dumps(make()))
            write_text(self.path, json.dumps(self.results, indent=1) + "\n")
        return kept[name]


def changes(before: Mapping[str, Any], now: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """In words, what of these parts of a report is not as it was."""
    return [
        f"{part}.{key} was {before[part].get(key)!r} and is now {value!r}"
        for part in parts
        for key, value in now[part].items()
        if before[part].get(key) != value
    ]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed, in words; empty if nothing did."""
    changed = [k for k in {**now, **before} if before.get(k) != now.get(k)]
    return ", ".join(
        f"{k} was {_short(before.get(k))} and is now {_short(now.get(k))}" for k in changed
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
