"""Rows of Markdown tables, and the cells that compare entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from report import Entry, gain


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(first: str, others: Sequence[str]) -> list[str]:
    return [row((first, *others)), f"|---|{'--:|' * len(others)}"]


def grouped(entries: Iterable[Entry]) -> dict[str, dict[str, Entry]]:
    groups: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        groups[entry.group][entry.who] = entry
    return groups


def beside(theirs: Entry | None, mine: str) -> Entry | None:
    """Whoever is to be compared with an entry, of the same run: another may have had another GPU of
    the kind.
    """
    return theirs.beside.get(mine) if theirs else None


def over(found: Mapping[str, Entry], rival: str, mine: str = "ours") -> str:
    """How many times as fast as a rival that is."""
    theirs = found.get(rival)
    times = gain(theirs, beside(theirs, mine))
    return f"{times:.2f}x" if times else ""


def share(floor: float, entry: Entry | None) -> str:
    return (
        f"{100 * floor / entry.median * entry.info.get('calls', 1):.0f} %"
        if entry and entry.median
        else ""
    )


APART = {
    "latents": "plain eager torch's, of what the plan changed in the noise",
    "images": "plain eager torch's, of how they differ from their mean",
    "results": "the reference's, of their own size",
}


def differences(entries: Iterable[Entry]) -> list[str]:
    """The largest of everyone's differences from what they were compared with."""
    most: dict[tuple[str, str], float] = defaultdict(float)
    for e in entries:
        for what, value in e.info.get("apart", {}).items():
            most[what, e.who] = max(most[what, e.who], value)
    lines = []
    for what, compared in APART.items():
        found = [
            f"{who} {100 * value:.2g} %" for (name, who), value in most.items() if name == what
        ]
        if found:
            lines.append(f"- {what} from {compared}, at most: {', '.join(found)}")
    return lines
