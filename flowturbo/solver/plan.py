"""Plan: which step when, at which times, with guidance where. A frozen value that can be printed,
compared and hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..checks import finite, numbers_of
from ..storage.files import write_text
from .steps import FITTED, MAX_PAST, STEPS, Field, Multistep, NoCachedVelocity, State, Step

MAX_STEPS = 1000
_RECORD = ("letters", "grid", "guidance_interval", "weights")


class Call(NamedTuple):
    """One evaluation of a network: of the predictor or the refiner, at time t, with both halves
    when guidance is asked or one.
    """

    refiner: bool
    t: float
    guided: bool


class Cost(NamedTuple):
    """Calls of a plan: of the predictor, of the refiner, and how many of each run with both halves
    when guidance is asked.
    """

    predictor: int
    refiner: int
    guided_predictor: int
    guided_refiner: int


@dataclass(frozen=True)
class Plan:
    """A sequence of steps on a time grid from 0 (noise) to 1 (data).

    letters: one letter a step, each in STEPS: H Heun, P pseudo corrector, R refiner, S refiner
        after the paper's equation 7, E Euler, A, B, C Adams-Bashforth of order 2, 3, 4, L and M
        linear multistep with the plan's weights, M on refined velocities.
    grid: the len(letters) + 1 times, strictly rising, from 0 to 1.
    guidance_interval: guidance acts on calls at times in this closed interval; outside, only the
        conditional half runs.
    start: where the grid starts: 0 but for editing, which starts on the path between noise and a
        source (see `starting_at`).
    weights: for each L and M step in order, of its own velocity and of those before it, newest
        first, with the step size in them; none at all for Adams-Bashforth's of order 4. `flowturbo
        tune` finds them.
    Raises ValueError, showing the place, for letters that are none, a step that needs a velocity no
    earlier step left, and grids that do not rise from 0 to 1. `Plan.parse` makes one from text,
    `Plan.load` from a file.
    """

    letters: str
    grid: tuple[float, ...]
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    start: float = 0.0
    weights: tuple[tuple[float, ...], ...] = ()
    calls: tuple[Call, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.letters, str):
            raise TypeError(f"letters must be a string, one letter a step, got {self.letters!r}")
        object.__setattr__(self, "grid", numbers_of("grid", self.grid))
        interval = numbers_of("guidance_interval", self.guidance_interval)
        object.__setattr__(self, "guidance_interval", interval)
        for i, letter in enumerate(self.letters):
            if letter not in STEPS:
                raise ValueError(
                    _mark(
                        self.letters,
                        i,
                        f"no step is called {letter!r}; there are {', '.join(STEPS)}",
                    )
                )
        if not 1 <= len(self.letters) <= MAX_STEPS:
            raise ValueError(f"a plan must have 1 to {MAX_STEPS} steps, got {len(self.letters)}")
        _check_grid(self.grid, len(self.letters), self.start)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {interval}"
            )
        object.__setattr__(
            self,
            "weights",
            _checked_weights(self.weights, sum(letter in FITTED for letter in self.letters)),
        )
        object.__setattr__(self, "calls", self._rehearse())

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        grid: Sequence[float] | None = None,
        shift: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Plan:
        """A plan from text such as "H1P5R3": letters, each with a count from 1 on (left out: 1), in
        the order they run.

        grid: the times, strictly rising from 0 to 1, one more than there are steps; None: uniform,
            then shifted.
        shift: > 0; as SD3's: noise level s = 1 - t becomes shift*s / (1 + (shift - 1)*s); above 1
            gives the noisy end more steps.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"plan must be a string like 'H1P5R3' or a Plan, got {type(text).__name__}"
            )
        letters = _expand(text)
        if finite("shift", shift) <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if grid is not None and shift != 1.0:
            raise ValueError(f"give grid or shift, not both; got shift={shift} and a grid")
        times = (
            shifted_grid(len(letters), float(shift)) if grid is None else numbers_of("grid", grid)
        )
        return cls(letters, times, guidance_interval)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """The plan that `record` describes."""
        letters, grid, interval, weights = (record[name] for name in _RECORD)
        return cls(letters, grid, interval, weights=weights)

    def record(self) -> dict[str, Any]:
        """The plan as values of JSON's types, letter by letter, for reports."""
        return {name: getattr(self, name) for name in _RECORD}

    def starting_at(self, t: float) -> Plan:
        """The same steps on the grid squeezed into [t, 1], 0 <= t < 1. Every step stays: so any
        plan can start anywhere.

        Weights shrink with the steps, although they were fitted to the whole way.
        """
        if not 0 <= finite("t", t) < 1:
            raise ValueError(f"t must be at least 0 and less than 1, got {t}")
        first, last = self.grid[0], self.grid[-1]
        grid = [t + (1 - t) * (time - first) / (last - first) for time in self.grid]
        share = (1 - t) / (last - first)
        weights = tuple(tuple(share * weight for weight in row) for row in self.weights)
        return Plan(self.letters, (t, *grid[1:-1], 1.0), self.guidance_interval, t, weights)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan of a file that `save` wrote. ValueError, naming the file and what is wrong in
        it, for any other.
        """
        try:
            lines = _read(Path(path))
            return cls.from_record({**lines, "letters": _expand(lines["plan"])})
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is no plan file: {error}") from None

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the plan as a .json file, whole or not at all. about: what to say of it there, for
        people.
        """
        if Path(path).suffix != ".json":
            raise ValueError(f"path must end in .json, got {str(path)!r}")
        if self.start:
            raise ValueError(
                f"a plan must start at 0 to be saved, got one that starts at {self.start:g}"
            )
        lines = {"format": _FORMAT, "plan": str(self), **self.record(), "about": dict(about or {})}
        del lines["letters"]
        write_text(path, json.dumps(lines, indent=1, allow_nan=False) + "\n")

    def __str__(self) -> str:
        """The letters with counts, e.g. 'H1P5R3': what `parse` takes. Grid, interval and weights
        are in repr.
        """
        return "".join(
            f"{letter}{len(list(run))}" for letter, run in itertools.groupby(self.letters)
        )

    @property
    def name(self) -> str:
        """The letters with counts, and, of a plan that these do not tell whole, a digest of the
        rest.
        """
        if self == Plan.parse(str(self)):
            return str(self)
        return f"{self}-{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}"

    def __len__(self) -> int:
        return len(self.letters)

    def schedule(self) -> Iterator[tuple[Step, float, float]]:
        """(step, t0, t1) in order."""
        yield from zip(self.steps, self.grid, self.grid[1:], strict=False)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps in order, with the plan's weights."""
        weights = iter(self.weights)
        return tuple(
            STEPS[letter]
            if letter not in FITTED or not self.weights
            else cast(Multistep, STEPS[letter]).weighted(next(weights))
            for letter in self.letters
        )

    def is_guided(self, t: float) -> bool:
        """Whether a call at time t runs with guidance, if guidance is asked at all."""
        low, high = self.guidance_interval
        return low <= t <= high

    @property
    def cost(self) -> Cost:
        predictor, refiner = (
            [c for c in self.calls if c.refiner == which] for which in (False, True)
        )
        return Cost(
            len(predictor),
            len(refiner),
            sum(c.guided for c in predictor),
            sum(c.guided for c in refiner),
        )

    def _rehearse(self) -> tuple[Call, ...]:
        """Run the plan on a field that notes its calls: they and validity are those of the run
        itself, said nowhere twice.
        """
        notes = _Notes(self)
        state = State(torch.zeros(1))
        for i, (step, t0, t1) in enumerate(self.schedule()):
            try:
                state = step(notes, state, t0, t1)
            except NoCachedVelocity as error:
                raise ValueError(_mark(self.letters, i, str(error))) from None
        return tuple(notes.calls)


class _Notes(Field):
    """A field that notes when it is called."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.calls: list[Call] = []

    def predict(self, x: Tensor, t: float) -> Tensor:
        self.calls.append(Call(False, t, self.plan.is_guided(t)))
        return x

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        self.calls.append(Call(True, t, self.plan.is_guided(t)))
        return v


def as_plan(plan: str | Plan, shift: float = 1.0) -> Plan:
    """The plan itself, or what its text says: letters, on a grid shifted so, or the name of a .json
    file.
    """
    if isinstance(plan, Plan):
        return plan
    return (
        Plan.load(plan)
        if isinstance(plan, str) and plan.endswith(".json")
        else Plan.parse(plan, shift=shift)
    )


def shifted_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """The uniform grid i / steps, with every noise level s = 1 - t moved to shift*s / (1 + (shift -
    1)*s).

    Written for t, so that both ends are exact: t / (t + shift * (1 - t)).
    """
    times = [i / steps for i in range(steps + 1)]
    return tuple(times if shift == 1 else [t / (t + shift * (1 - t)) for t in times])


_RUN = re.compile(r"([A-Z])([0-9]*)")


def _expand(text: str) -> str:
    letters, at = "", 0
    while at < len(text):
        found = _RUN.match(text, at)
        if found is None or found[1] not in STEPS:
            known = ", ".join(STEPS)
            raise ValueError(
                _mark(
                    text,
                    at,
                    f"plan must look like 'H1P5R3': letters of {known}, each with a count; got "
                    f"{text[at]!r}",
                )
            )
        digits = found[2] or "1"
        if digits.startswith("0") or len(digits) > 4:
            raise ValueError(
                _mark(
                    text,
                    found.start(2),
                    f"a count must be from 1 to {MAX_STEPS}, got {digits[:12]}",
                )
            )
        if len(letters) + int(digits) > MAX_STEPS:
            raise ValueError(
                _mark(text, found.start(2), f"a plan must have 1 to {MAX_STEPS} steps")
            )
        letters += found[1] * int(digits)
        at = found.end()
    if not letters:
        raise ValueError("plan must look like 'H1P5R3', got an empty string")
    return letters


def _check_grid(grid: tuple[float, ...], steps: int, start: float) -> None:
    if len(grid) != steps + 1:
        raise ValueError(
            f"grid must hold {steps + 1} times, one more than the {steps} steps, got {len(grid)}"
        )
    for i, (t0, t1) in enumerate(itertools.pairwise(grid)):
        if not t0 < t1:  # also catches NaN
            raise ValueError(
                f"grid must rise strictly, but grid[{i}] = {t0} is followed by grid[{i + 1}] = {t1}"
            )
    if not 0 <= start < 1:
        raise ValueError(f"start must be at least 0 and less than 1, got {start}")
    if grid[0] != start or grid[-1] != 1:
        raise ValueError(
            f"grid must run from {start:g} to 1, got grid[0] = {grid[0]} and grid[{steps}] = "
            f"{grid[-1]}"
        )


def _checked_weights(
    weights: Iterable[Iterable[float]], steps: int
) -> tuple[tuple[float, ...], ...]:
    if isinstance(weights, str | bytes) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a list of lists of numbers, got {weights!r}")
    rows = tuple(numbers_of(f"weights[{i}]", row) for i, row in enumerate(weights))
    if rows and len(rows) != steps:
        raise ValueError(
            f"weights must be given for each of the {steps} steps of {' and '.join(FITTED)}, or "
            f"for none, got {len(rows)}"
        )
    for i, row in enumerate(rows):
        if not 1 <= len(row) <= MAX_PAST + 1 or not all(map(math.isfinite, row)):
            raise ValueError(f"weights[{i}] must be 1 to {MAX_PAST + 1} finite numbers, got {row}")
    return rows


_FORMAT = "flowturbo plan 1"
_MOST_BYTES = 1 << 20
_ENTRIES = {
    "format": str,
    "plan": str,
    "grid": list,
    "guidance_interval": list,
    "weights": list,
    "about": dict,
}


def _read(path: Path) -> dict[str, Any]:
    """The entries of a plan file, each of its type."""
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice")
        return dict(pairs)

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number")

    found = json.loads(data.decode(), object_pairs_hook=entries, parse_constant=no_number)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"its format must be {_FORMAT!r}")
    if found.keys() != _ENTRIES.keys():
        raise ValueError(
            f"it must hold {', '.join(_ENTRIES)}, and holds {', '.join(map(repr, found))}"
        )
    for key, kind in _ENTRIES.items():
        if not isinstance(found[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, got {type(found[key]).__name__}")
    return found


def _mark(text: str, at: int, message: str) -> str:
    """The message with the text under it and a mark under the place."""
    shown = text if len(text) <= 60 else text[max(0, at - 30) : at + 30]
    column = at if len(text) <= 60 else min(at, 30)
    return f"{message}\n  {shown}\n  {' ' * column}^"
