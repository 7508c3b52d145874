"""Plan files: the JSON in which a plan is saved, with stages or without."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.text import decoded

FORMAT, STAGES_FORMAT = "flowturbo plan 1", "flowturbo stages 1"
_MAX_BYTES = 1 << 20
_ENTRIES = {
    "format": str,
    "plan": str,
    "grid": list,
    "guidance_interval": list,
    "weights": list,
    "about": dict,
}

ONLY_WITH_STAGES = "sample, compile and sample_stages take such a plan, and nothing else does"
"""What a refusal of a plan with stages says."""


def read_contents(path: Path) -> dict[str, Any]:
    """What a file of either format holds, unchecked but for its format.

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

    contents = json.loads(decoded(data, "it"), object_pairs_hook=entries, parse_constant=no_number)
    format_of(contents)
    return contents


def format_of(contents: Any) -> str:
    """The format of what a file holds. ValueError if it is neither of the two."""
    named = contents.get("format") if isinstance(contents, dict) else None
    if named not in (FORMAT, STAGES_FORMAT):
        raise ValueError(f"its format must be {FORMAT!r}")
    return named


def plan_entries(contents: Any) -> dict[str, Any]:
    """The entries of the file of a plan without stages, with their types checked.

    Raises ValueError saying what is wrong.
    """
    if format_of(contents) == STAGES_FORMAT:
        raise ValueError(f"it holds a plan with stages: {ONLY_WITH_STAGES}")
    return checked_entries(contents, _ENTRIES)


def checked_entries(contents: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, if they are these and of these types; ValueError otherwise."""
    if not isinstance(contents, dict) or contents.keys() != kinds.keys():
        held = ", ".join(map(repr, contents)) if isinstance(contents, dict) else repr(contents)
        raise ValueError(f"it must hold {', '.join(kinds)}, and holds {held}")
    for key, kind in kinds.items():
        if not isinstance(contents[key], kind):
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{key} must be a {name}, got {type(contents[key]).__name__}")
    return contents
