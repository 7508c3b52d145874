"""metadata.jsonl: a table of captions, one JSON object a line."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from .folders import EXTENSIONS, suffix
from .text import file_path, read_lines


def table_of_captions(table: Path, images: Sequence[str]) -> list[tuple[str, str]]:
    """File name and caption of each line; empty lines are skipped.

    images: the images of its folder. Raises ValueError, naming file and line, for a line of another
    kind or of an image that is missing, and for images that no line names.
    """
    # macOS may store a name's accents as characters of their own.
    stored = {unicodedata.normalize("NFC", name): name for name in images}
    pairs = [
        _caption(table, number, line, stored)
        for number, line in enumerate(read_lines(table), 1)
        if line.strip()
    ]
    named = {_plain(name) for name, _ in pairs}
    without = [name for name in images if _plain(name) not in named]
    if without:
        raise ValueError(
            f"{table} has no line for {len(without)} of the {len(images)} images of its folder, "
            f"the first {without[0]}: add their captions, or move them away"
        )
    return pairs


def _caption(table: Path, number: int, line: str, stored: dict[str, str]) -> tuple[str, str]:
    try:
        row = json.loads(line)
        name, text = row["file_name"], row["text"]
        valid = isinstance(name, str) and isinstance(text, str) and bool(name)
        text.encode()  # an escape can stand for half a character, which no tokenizer takes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"{table}, line {number}, must be JSON with file_name and text, got {line[:80]!r}"
        )
    if not _exists(table.parent, name):
        name = stored.get(_plain(name), name)
    if not _exists(table.parent, name):
        raise ValueError(f"{table}, line {number}: {name} does not exist")
    if suffix(name) not in EXTENSIONS:
        raise ValueError(
            f"{table}, line {number}: {name} is of a kind that is not read "
            f"({', '.join(EXTENSIONS)} are)"
        )
    return name, text


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def _exists(folder: Path, name: str) -> bool:
    try:
        return file_path(folder, name).is_file()
    except (ValueError, OSError):  # a name that no file can have
        return False
