"""The table in docs/text-to-image.md: what plans do in every flow-matching pipeline of diffusers.

python tests/helpers/pipeline_table.py prints it; with --write it writes it into the page, and the
names of the pipelines that take plans into the library.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import zoo
from pipeline_walk import AT_ZERO, BOUND, EULER, PLANS, Outcome, outcome

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "text-to-image.md"
MODULE = ROOT / "flowturbo" / "integrations" / "tested_pipelines.py"
BEGIN, END = "<!-- pipelines: begin -->\n", "<!-- pipelines: end -->\n"
HEAD = "| pipelines | their scheduler | with a plan |\n|---|---|---|\n"


def row_key(result: Outcome) -> tuple[str, str, str]:
    """Folder, scheduler, and outcome in words; pipelines with the same share a row."""
    kind = result.name.partition(":")[0]
    words = _words(result) + (f" ({result.note})" if result.note else "")
    scheduler = result.scheduler.removesuffix("Scheduler")
    return zoo.flow_pipelines().get(kind, "modular"), scheduler, words.replace("|", "/")


def _words(result: Outcome) -> str:
    if result.faults:
        return "; ".join(result.faults)
    taken = [plan for plan in PLANS if plan not in result.refused]
    if len(taken) == len(PLANS):
        return "exact"
    if not taken:
        return f"refused: {_reason(result.refused[EULER])}"
    if taken == [plan for plan in PLANS if plan != AT_ZERO]:
        return "exact; calls at noise level 0 are refused"
    assert taken == [EULER]
    return f"exact for E plans; others are refused: {_reason(result.refused[AT_ZERO])}"


def _reason(message: str) -> str:
    """accelerate's message without the names in it, which the row has already."""
    message = re.sub(r"^plans (can't run in|take the place of .* not of) \w+: ", "", message)
    message = re.sub(r" (this|a) [A-Z]\w+", r" \1 pipeline", message)
    return re.sub(r", got \w+$", "", message)


def tested(results: Iterable[Outcome]) -> frozenset[str]:
    """The classes of pipelines that take a plan, E plans at least, without a fault."""
    return frozenset(
        result.name.partition(":")[0]
        for result in results
        if EULER not in result.refused and not result.faults
    )


def table(results: Iterable[Outcome]) -> str:
    """One row for pipelines of one folder, scheduler and outcome. Names are without "Pipeline"."""
    rows: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for result in results:
        rows[row_key(result)].append(_short(result.name))
    for name, why in zoo.UNTRIED.items():
        rows[zoo.flow_pipelines()[name], "", f"not tried: {why}"].append(_short(name))
    return HEAD + "".join(
        f"| {', '.join(sorted(names))} | {scheduler} | {words} |\n"
        for (_, scheduler, words), names in sorted(rows.items(), key=lambda item: item[0])
    )


def _short(name: str) -> str:
    """A class's name without "Pipeline", and what is special about it in brackets."""
    kind, _, special = name.partition(": ")
    return kind.removesuffix("Pipeline") + (f" ({special})" if special else "")


def written() -> str:
    """The table as it is in the page."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text, mark, _ = rest.partition(END)
    assert mark, f"{PAGE.name} has no table between {BEGIN!r} and {END!r}"
    return text


def main() -> None:
    torch.set_num_threads(1)  # as in the tests: threads only hinder one another in tiny products
    results = [outcome(name) for name in zoo.builders()]
    text = table(results)
    if sys.argv[1:] == ["--write"]:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(BEGIN + written() + END, BEGIN + text + END), encoding="utf-8")
        head, names, _ = MODULE.read_text(encoding="utf-8").partition("_NAMES = ")
        filled = textwrap.fill(" ".join(sorted(tested(results))), 100, break_long_words=False)
        tail = "TESTED = frozenset(_NAMES.split())"
        MODULE.write_text(f'{head}{names}"""\n{filled}\n"""\n{tail}\n', encoding="utf-8")
    else:
        sys.stdout.write(text)
    worst = max(e for result in results for e in result.errors.values())
    print(f"largest relative error: {worst:.1e}; allowed: {BOUND:.0e}", file=sys.stderr)


if __name__ == "__main__":
    main()
