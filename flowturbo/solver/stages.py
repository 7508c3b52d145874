"""Plans with stages: small images first, larger ones from there (coarse to fine).

A stage runs a plan between two noise levels at one size. Where the next stage takes over, the noise
levels of the two are matched: enlarging by r takes the noise of r * r values together, so the same
information is there at the level where (1 - level) / level is r times smaller. This is the shift
of SD3 (arXiv 2403.03206, section 5.3.2), and what RALU (arXiv 2507.08422) calls noise-timestep
rescheduling.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..checks import finite
from ..storage.files import write_text
from .plan import Cost, Plan, as_plan
from .plan_file import STAGES_FORMAT, checked_entries, format_of, read_contents
from .plan_text import expand, has_stages, marked

MAX_STAGES = 16
_SMALLEST = Fraction(1, 10**6)  # of a stage: no image has so few pixels, and ratios stay numbers

_WORD = re.compile(r"\+|[^\s+]+")
_NUMBER = re.compile(r"(\d+(\.\d+)?|\.\d+)(e-\d{1,3})?")
_SIZE = re.compile(rf"\d+/[1-9]\d*|{_NUMBER.pattern}")
_EXAMPLE = "'A4 at 1/2 + A3 from 0.6'"
_ENTRIES = {"format": str, "stages": list, "about": dict}
_PLAN = {"plan": str, "grid": list, "guidance_interval": list, "weights": list}
_STAGE = {"plan": str | dict, "size": str, "start": int | float, "end": int | float | None}


def matched_level(level: float, ratio: float) -> float:
    """The noise level at which a smaller image knows as much as a larger one at `level`.

    ratio: by which the sides of the larger image are longer. Below 1 it is the other way round.
    """
    return level / (level + ratio * (1 - level))


@dataclass(frozen=True)
class Stage:
    """A part of a plan with stages.

    plan: text such as "A4", whose grid is uniform but for the shift of the model at this size; or
        a Plan, whose grid is compressed into the stage.
    size: of a side, relative to the finished image: above 0, at most 1; a number or text such as
        "1/2".
    start: the noise level, 1 - t, at which it takes over, at its own size; 1: it starts from noise.
    end: the noise level at which it stops; None: the level that matches the start of the next
        stage, or 0 for the last stage. It may be lower: the next stage then starts with new noise.
    Raises ValueError or TypeError for a value that does not fit.
    """

    plan: str | Plan
    size: Fraction = Fraction(1)
    start: float = 1.0
    end: float | None = None

    def __post_init__(self) -> None:
        whole = as_plan(self.plan)
        if whole.start:
            raise ValueError(f"plan must start at 0, got one that starts at {whole.start:g}")
        plan = self.plan if isinstance(self.plan, Plan) or self.plan.endswith(".json") else None
        object.__setattr__(self, "plan", whole if plan is not None else str(whole))
        object.__setattr__(self, "size", _fraction(self.size))
        object.__setattr__(self, "start", finite("start", self.start))
        if not 0 < self.size <= 1:
            raise ValueError(f"size must be above 0 and at most 1, got {self.size}")
        if self.size < _SMALLEST:
            raise ValueError(f"size must be at least {_SMALLEST}, got {float(self.size):g}")
        if not 0 < self.start <= 1:
            raise ValueError(f"start must be above 0 and at most 1, got {self.start}")
        if self.end is not None:
            object.__setattr__(self, "end", finite("end", self.end))
            if not 0 <= self.end < self.start:
                raise ValueError(
                    f"end must be at least 0 and below start, {self.start:g}, got {self.end:g}"
                )

    def __str__(self) -> str:
        """As `StagedPlan.parse` reads it; of a Plan only the letters."""
        text = str(self.plan)
        text += "" if self.size == 1 else f" at {self.size}"
        text += "" if self.start == 1 else f" from {_shortest(self.start)}"
        return text if self.end is None else f"{text} to {_shortest(self.end)}"

    def between(self, start: float, end: float, shift: float) -> Plan:
        """The stage's plan from the noise level `start` to `end`.

        shift: of the model at the stage's size, for a plan given as text: its grid is a part of the
            one that `Plan.parse` would shift.
        """
        if isinstance(self.plan, Plan):
            return self.plan if (start, end) == (1, 0) else self.plan.between(1 - start, 1 - end)
        if (start, end) == (1, 0):
            return Plan.parse(self.plan, shift=shift)
        letters = expand(self.plan)
        first, last = (t * shift / (1 + (shift - 1) * t) for t in (1 - start, 1 - end))
        grid = [first + (last - first) * i / len(letters) for i in range(len(letters) + 1)]
        times = [t / (t + shift * (1 - t)) for t in grid]
        times[0], times[-1] = 1 - start, 1 - end
        return Plan(letters, tuple(times), start=times[0], end=times[-1])


@dataclass(frozen=True)
class StagedPlan:
    """Stages in the order they run. Their sizes do not fall, and the last is 1.

    `parse` reads them from text, `load` from a file. Raises ValueError for stages that do not
    follow each other.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        stages = tuple(self.stages)
        object.__setattr__(self, "stages", stages)
        if not 1 <= len(stages) <= MAX_STAGES or not all(isinstance(s, Stage) for s in stages):
            raise ValueError(f"stages must be 1 to {MAX_STAGES} of Stage, got {self.stages!r}")
        if stages[0].start != 1:
            raise ValueError(
                f"the first stage must start at noise level 1, got {stages[0].start:g}"
            )
        if stages[-1].size != 1:
            raise ValueError(f"the last stage must have size 1, got {stages[-1].size}")
        if stages[-1].end not in (None, 0):
            raise ValueError(f"the last stage must end at noise level 0, got {stages[-1].end}")
        for number, (before, after) in enumerate(itertools.pairwise(stages), 2):
            if after.size < before.size:
                raise ValueError(
                    f"stage {number} must not be smaller than the one before it, {before.size}, "
                    f"got size {after.size}"
                )
            if after.start == 1:
                raise ValueError(
                    f"stage {number} must say from which noise level below 1 it takes over, such "
                    f"as 'from 0.6'"
                )
        self.levels([float(stage.size) for stage in stages])

    @classmethod
    def parse(cls, text: str) -> StagedPlan:
        """Stages from text such as "A4 at 1/2 + A3 from 0.6".

        Stages are joined by "+". Each is a plan's text, then, in any order: "at" its size (left
        out: 1), "from" the noise level at which it takes over (left out in the first), "to" the
        noise level at which it stops (left out: the matching one).
        Raises ValueError, with a mark under the place, for other text.
        """
        words = [(m.group(), m.start()) for m in _WORD.finditer(text)]
        stages, position = [], 0
        while True:
            stage, position = _parsed(text, words, position)
            stages.append(stage)
            if position == len(words):
                return cls(tuple(stages))
            position += 1  # the +

    @classmethod
    def from_contents(cls, contents: Any) -> StagedPlan:
        """The stages that a file of `save` holds, read from JSON.

        Raises ValueError or TypeError for anything else.
        """
        entries = checked_entries(contents, _ENTRIES)
        return cls(tuple(map(_stage_of, entries["stages"])))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StagedPlan:
        """Read the stages from a file that `save` wrote.

        Raises ValueError, naming the file and what is wrong with it, for any other file.
        """
        try:
            return cls.from_contents(read_contents(Path(path)))
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is no file of a plan with stages: {error}") from None

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the stages as a .json file, atomically.

        about: notes for readers of the file. Raises ValueError for another suffix.
        """
        if Path(path).suffix != ".json":
            raise ValueError(f"path must end in .json, got {str(path)!r}")
        entries = {"format": STAGES_FORMAT, "stages": self.record(), "about": dict(about or {})}
        write_text(path, json.dumps(entries, indent=1, allow_nan=False) + "\n")

    def record(self) -> list[dict[str, Any]]:
        """The stages as values that JSON can hold, for files and reports."""
        return [
            {
                "plan": stage.plan
                if isinstance(stage.plan, str)
                else {"plan": str(stage.plan), **_without_letters(stage.plan.record())},
                "size": str(stage.size),
                "start": stage.start,
                "end": stage.end,
            }
            for stage in self.stages
        ]

    def __str__(self) -> str:
        return " + ".join(map(str, self.stages))

    def __len__(self) -> int:
        """The number of steps of all stages."""
        return sum(len(as_plan(stage.plan)) for stage in self.stages)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each stage between its noise levels, for a model without a shift."""
        levels = self.levels([float(stage.size) for stage in self.stages])
        return tuple(s.between(*ends, 1.0) for s, ends in zip(self.stages, levels, strict=True))

    @property
    def price(self) -> float:
        """Predictor calls, each times the share of the finished image's tokens that it reads.

        Attention costs less than its share at small sizes, so a long sequence gains more.
        """
        return sum(
            plan.cost.predictor * float(stage.size) ** 2
            for stage, plan in zip(self.stages, self.plans, strict=True)
        )

    @property
    def cost(self) -> Cost:
        """The number of calls of all stages, by network, whatever their size."""
        return Cost(*map(sum, zip(*(plan.cost for plan in self.plans), strict=True)))

    def levels(self, sides: Sequence[float]) -> list[tuple[float, float]]:
        """The noise levels (start, end) of each stage, for images of these side lengths.

        Raises ValueError if a stage ends with more noise than the next one may start with.
        """
        levels = []
        for number, stage in enumerate(self.stages, 1):
            end = 0.0
            if number < len(self.stages):
                after = self.stages[number].start
                ratio = sides[number] / sides[number - 1]
                matching = matched_level(after, ratio)
                end = matching if stage.end is None else stage.end
                if end > matching:
                    raise ValueError(
                        f"stage {number} must go to noise level {matching:.4g} or lower, which "
                        f"matches {after:g} at {ratio:.4g} times its size, got {end:g}"
                    )
            if not end < stage.start:
                raise ValueError(
                    f"stage {number} must end below the noise level at which it starts, "
                    f"{stage.start:g}, got {end:.4g}, which matches the start of the next stage"
                )
            levels.append((stage.start, end))
        return levels


def as_stages(plan: str | Plan | StagedPlan, shift: float = 1.0) -> Plan | StagedPlan:
    """A plan with stages or without, as it is, or from a text or a .json file.

    shift: of the grid of a plan without stages given as text. A single stage is a plan.
    """
    if isinstance(plan, str) and plan.endswith(".json"):
        plan = load_plan(plan)
    elif isinstance(plan, str) and has_stages(plan):
        plan = StagedPlan.parse(plan)
    if isinstance(plan, StagedPlan) and len(plan.stages) == 1:
        plan = plan.stages[0].plan
    return plan if isinstance(plan, StagedPlan) else as_plan(plan, shift)


def load_plan(path: str | os.PathLike[str]) -> Plan | StagedPlan:
    """The plan in a file of either format; ValueError, naming the file, for any other file."""
    try:
        staged = read_contents(Path(path))["format"] == STAGES_FORMAT
    except (OSError, ValueError, RecursionError):
        staged = False  # Plan.load says what is wrong
    return StagedPlan.load(path) if staged else Plan.load(path)


def plan_of(contents: Any) -> Plan | StagedPlan:
    """The plan that a file of either format holds, read from JSON; ValueError or TypeError."""
    staged = format_of(contents) == STAGES_FORMAT
    return StagedPlan.from_contents(contents) if staged else Plan.from_contents(contents)


def _parsed(text: str, words: Sequence[tuple[str, int]], position: int) -> tuple[Stage, int]:
    """The stage whose plan is the word at `position` -> (it, the position after it)."""

    def word() -> tuple[str, int]:
        return words[position] if position < len(words) else ("", len(text))

    plan, first = word()
    if plan in ("", "+"):
        raise ValueError(
            marked(text, first, f"a plan with stages must look like {_EXAMPLE}: here a plan is due")
        )
    expand(text, first, first + len(plan))
    position += 1
    found: dict[str, Any] = {}
    while position < len(words) and word()[0] != "+":
        name, at = word()
        if name not in ("at", "from", "to") or name in found:
            expected = [known for known in ("at", "from", "to") if known not in found]
            message = f"after a plan come {', '.join(expected)} or +, got {name!r}"
            raise ValueError(marked(text, at, message))
        position += 1
        value, at = word()
        if not (_SIZE if name == "at" else _NUMBER).fullmatch(value):
            example = "a size such as 1/2" if name == "at" else "a noise level such as 0.6"
            raise ValueError(marked(text, at, f"after {name!r} comes {example}, got {value!r}"))
        found[name] = value if name == "at" else float(value)
        position += 1
    try:
        stage = Stage(plan, found.get("at", "1"), found.get("from", 1.0), found.get("to"))
    except ValueError as error:
        raise ValueError(marked(text, first, str(error))) from None
    return stage, position


def _fraction(size: Any) -> Fraction:
    if isinstance(size, str):
        if not _SIZE.fullmatch(size):
            raise ValueError(f"size must look like '1/2' or '0.5', got {size!r}")
        return Fraction(size)
    # 0.75 is meant, not the binary number next to it.
    return size if isinstance(size, Fraction) else Fraction(str(finite("size", size)))


def _stage_of(entries: Any) -> Stage:
    """A stage from its record."""
    checked = checked_entries(entries, _STAGE)
    plan = checked["plan"]
    if isinstance(plan, dict):
        plan = Plan.from_record({**checked_entries(plan, _PLAN), "letters": expand(plan["plan"])})
    else:
        expand(plan)  # a file names no other file
    return Stage(plan, checked["size"], checked["start"], checked["end"])


def _shortest(level: float) -> str:
    """The number so that it can be read back to the bit."""
    return repr(level).removesuffix(".0")


def _without_letters(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "letters"}
