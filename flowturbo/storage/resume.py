"""Runs that resume: results are stored with their settings.

A later run resumes only if its settings are the same. Otherwise the error names the differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import load_tensors, write_json

OTHER_FOLDER = "choose another folder as out"


def difference(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> str:
    """The differences in words, e.g. "seed was 0 and is now 1, model.depth was ..."; "" if none.

    free: keys that may differ.
    """
    return ", ".join(_differences(before, now, free))


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = (), prefix: str = ""
) -> list[str]:
    lines = []
    for key in {**now, **before}:
        old, new = before.get(key), now.get(key)
        if key in free or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _differences(old, new, prefix=f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} was {_short(old)} and is now {_short(new)}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_same(
    what: object,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    cure: str = OTHER_FOLDER,
) -> None:
    """Raise ValueError, naming the differences, unless the settings are the same.

    what: the file or folder that `before` was read from.
    free: keys that may differ.
    cure: advice, for the end of the message.
    """
    if text := difference(before, now, free):
        raise ValueError(f"{what} was made with other settings ({text}): {cure}")


def resumed_report(
    path: Path, identity: Mapping[str, Any], rest: Mapping[str, Any], of: str
) -> dict[str, Any]:
    """The results in a JSON file, or new ones: `identity` and `rest`.

    identity: "format", and everything that the results depend on.
    rest: what new results hold besides, e.g. {"rows": []}.
    of: what these are results of, in words, for messages.
    Raises ValueError for a file that holds no such results, or results with another identity.
    """
    identity = json.loads(json.dumps(identity))
    fresh = {**identity, **rest}
    if not path.exists():
        return fresh
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        valid = stored["format"] == identity["format"]
        valid = valid and all(isinstance(stored[key], type(value)) for key, value in fresh.items())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of {of}: {error!r}") from None
    if not valid:
        raise ValueError(f"{path} holds no results of {of} of format {identity['format']}")
    check_same(path, {key: stored[key] for key in identity}, identity)
    return stored


def resumed_tensors(path: Path, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors in a file, or None if it does not exist.

    Raises ValueError for another identity, CheckpointError for a damaged file.
    """
    if not path.exists():
        return None
    tensors, stored = load_tensors(path)
    check_same(path, stored or {}, json.loads(json.dumps(identity)))
    return tensors


def remove_partial_files(folder: Path, *names: str) -> None:
    """Remove temporary files that killed runs left for these names.

    names: may hold wildcards. No other process may be writing to the folder.
    """
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink()


class Keep:
    """Values in a JSON report, each computed once, by name.

    A run that is killed and started again computes only the missing ones. `make` returns values
    that JSON can hold.
    """

    def __init__(self, path: Path, results: dict[str, Any]) -> None:
        self.path, self.results = path, results

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        values = self.results["kept"]
        if name not in values:
            values[name] = json.loads(json.dumps(make()))
            write_json(self.path, self.results)
        return values[name]
