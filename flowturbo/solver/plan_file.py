"""Plan files: the JSON in which a plan is saved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

FORMAT = "flowturbo plan 1"
_MAX_BYTES = 1 << 20
_ENTRIES = {
    "format": str,
    "plan": str,
    "grid": list,
    "guidance_interval": list,
    "weights": list,
    "about": dict,
}


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a plan file, with their types checked.

    Raises OSError or ValueError saying what is wrong.
    """
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise ValueError(f"{repeated[0]!r} stands there twice")
        return dict(pairs)

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number")

    contents = json.loads(data.decode(), object_pairs_hook=entries, parse_constant=no_number)
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT!r}")
    if contents.keys() != _ENTRIES.keys():
        raise ValueError(
            f"it must hold {', '.join(_ENTRIES)}, and holds {', '.join(map(repr, contents))}"
        )
    for key, kind in _ENTRIES.items():
        if not isinstance(contents[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, got {type(contents[key]).__name__}")
    return contents
