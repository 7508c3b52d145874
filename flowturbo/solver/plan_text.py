"""Plans as text: letters with counts, such as "H1P5R3"."""

from __future__ import annotations

import re

from .steps import STEPS

MAX_STEPS = 1000

_RUN = re.compile(r"([A-Z])([0-9]*)")
_STAGES = re.compile(r"\+|\b(at|from|to)\b")


def has_stages(text: str) -> bool:
    """Whether a text is meant as a plan with stages, such as "A4 at 1/2 + A3 from 0.6"."""
    return _STAGES.search(text) is not None


def expand(text: str, first: int = 0, last: int | None = None) -> str:
    """The letters of a plan without counts: "H1P2" -> "HPP".

    first, last: where the plan stands in the text; by default it is all of it.
    Raises ValueError, with a mark under the character, for letters and counts that are not allowed.
    """
    letters, position = "", first
    last = len(text) if last is None else last
    while position < last:
        run = _RUN.match(text, position, last)
        if run is None or run[1] not in STEPS:
            known = ", ".join(STEPS)
            raise ValueError(
                marked(
                    text,
                    position,
                    f"plan must look like 'H1P5R3': letters of {known}, each with a count; got "
                    f"{text[position]!r}",
                )
            )
        digits = run[2] or "1"
        if digits.startswith("0") or len(digits) > 4:
            raise ValueError(
                marked(
                    text,
                    run.start(2),
                    f"a count must be from 1 to {MAX_STEPS}, got {digits[:12]}",
                )
            )
        if len(letters) + int(digits) > MAX_STEPS:
            raise ValueError(marked(text, run.start(2), f"a plan must have 1 to {MAX_STEPS} steps"))
        letters += run[1] * int(digits)
        position = run.end()
    if not letters:
        raise ValueError("plan must look like 'H1P5R3', got an empty string")
    return letters


def marked(text: str, at: int, message: str) -> str:
    """The message, with the text and a mark under its character `at` below it."""
    shown = text if len(text) <= 60 else text[max(0, at - 30) : at + 30]
    column = at if len(text) <= 60 else min(at, 30)
    return f"{message}\n  {shown}\n  {' ' * column}^"
