"""The documents' fenced blocks in order, and the commands of a bash block."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from paths import ROOT

DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "bench").glob("*.md"),
    ]
)


class Block(NamedTuple):
    """A fenced block. line: the document's line on which its text starts."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


def commands(bash: str) -> Iterator[list[str]]:
    """The words of each command in order. A loop `for NAME in WORDS; do ... done` is unrolled."""
    loop: tuple[str, list[str], list[list[str]]] | None = None
    for line in re.split(r"\n|&&", bash.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "for":
            assert words[2] == "in", line
            assert words[-1] == "do", line
            loop = (words[1], [word.rstrip(";") for word in words[3:-1]], [])
        elif words == ["done"]:
            assert loop is not None, line
            name, values, body = loop
            for value in values:
                yield from (
                    [word.replace(f"${name}", value) for word in command] for command in body
                )
            loop = None
        elif loop is not None:
            loop[2].append(words)
        else:
            yield words
    assert loop is None, "a loop without done"


def flowturbo_words(command: list[str]) -> list[str] | None:
    """The arguments of `flowturbo ...`, `python -m flowturbo ...` or `torchrun ... -m flowturbo
    ...`; None for another command.
    """
    if command[0] == "flowturbo":
        return command[1:]
    if command[0] in ("python", "torchrun") and "flowturbo" in command:
        at = command.index("flowturbo")
        return command[at + 1 :] if command[at - 1] == "-m" else None
    return None
