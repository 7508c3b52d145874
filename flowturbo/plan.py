"""Plan: which step when, at which times, with guidance where. A frozen value that can be printed, compared and hashed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import finite, numbers_of
from .steps import STEPS, Field, NoCachedVelocity, State, Step

MAX_STEPS = 1000


class Call(NamedTuple):
    """One evaluation of a network: of the predictor or the refiner, at time t, with both halves when guidance is asked or one."""

    refiner: bool
    t: float
    guided: bool


class Cost(NamedTuple):
    """Calls of a plan: of the predictor, of the refiner, and how many of each run with both halves when guidance is asked."""

    predictor: int
    refiner: int
    guided_predictor: int
    guided_refiner: int


@dataclass(frozen=True)
class Plan:
    """A sequence of steps on a time grid from 0 (noise) to 1 (data).

    letters: one letter a step, each in STEPS: H Heun, P pseudo corrector, R refiner, S refiner after the paper's equation 7,
        E Euler, A, B, C Adams-Bashforth of order 2, 3, 4.
    grid: the len(letters) + 1 times, strictly rising, from 0 to 1.
    guidance_interval: guidance acts on calls at times in this closed interval; outside, only the conditional half runs.
    start: where the grid starts: 0 but for editing, which starts on the path between noise and a source (see `starting_at`).
    Raises ValueError, showing the place, for letters that are none, a step that needs a velocity no earlier step left, and grids
    that do not rise from 0 to 1. `Plan.parse` makes one from text.
    """

    letters: str
    grid: tuple[float, ...]
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    start: float = 0.0
    calls: tuple[Call, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.letters, str):
            raise TypeError(f"letters must be a string, one letter a step, got {self.letters!r}")
        object.__setattr__(self, "grid", numbers_of("grid", self.grid))
        interval = numbers_of("guidance_interval", self.guidance_interval)
        object.__setattr__(self, "guidance_interval", interval)
        for i, letter in enumerate(self.letters):
            if letter not in STEPS:
                raise ValueError(_mark(self.letters, i, f"no step is called {letter!r}; there are {', '.join(STEPS)}"))
        if not 1 <= len(self.letters) <= MAX_STEPS:
            raise ValueError(f"a plan must have 1 to {MAX_STEPS} steps, got {len(self.letters)}")
        _check_grid(self.grid, len(self.letters), self.start)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {interval}")
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
        """A plan from text such as "H1P5R3": letters, each with a count from 1 on (left out: 1), in the order they run.

        grid: the times, strictly rising from 0 to 1, one more than there are steps; None: uniform, then shifted.
        shift: > 0; as SD3's: noise level s = 1 - t becomes shift*s / (1 + (shift - 1)*s); above 1 gives the noisy end more steps.
        """
        if not isinstance(text, str):
            raise TypeError(f"plan must be a string like 'H1P5R3' or a Plan, got {type(text).__name__}")
        letters = _expand(text)
        if finite("shift", shift) <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if grid is not None and shift != 1.0:
            raise ValueError(f"give grid or shift, not both; got shift={shift} and a grid")
        times = shifted_grid(len(letters), float(shift)) if grid is None else numbers_of("grid", grid)
        return cls(letters, times, guidance_interval)

    def starting_at(self, t: float) -> Plan:
        """The same steps on the grid squeezed into [t, 1], 0 <= t < 1. Every step stays: so any plan can start anywhere."""
        if not 0 <= finite("t", t) < 1:
            raise ValueError(f"t must be at least 0 and less than 1, got {t}")
        first, last = self.grid[0], self.grid[-1]
        grid = [t + (1 - t) * (time - first) / (last - first) for time in self.grid]
        return Plan(self.letters, (t, *grid[1:-1], 1.0), self.guidance_interval, t)

    def __str__(self) -> str:
        """The letters with counts, e.g. 'H1P5R3': what `parse` takes. Grid and interval are in repr."""
        return "".join(f"{letter}{len(list(run))}" for letter, run in itertools.groupby(self.letters))

    def __len__(self) -> int:
        return len(self.letters)

    def schedule(self) -> Iterator[tuple[Step, float, float]]:
        """(step, t0, t1) in order."""
        for letter, t0, t1 in zip(self.letters, self.grid, self.grid[1:], strict=False):
            yield STEPS[letter], t0, t1

    def is_guided(self, t: float) -> bool:
        """Whether a call at time t runs with guidance, if guidance is asked at all."""
        low, high = self.guidance_interval
        return low <= t <= high

    @property
    def cost(self) -> Cost:
        predictor, refiner = ([c for c in self.calls if c.refiner == which] for which in (False, True))
        return Cost(len(predictor), len(refiner), sum(c.guided for c in predictor), sum(c.guided for c in refiner))

    def _rehearse(self) -> tuple[Call, ...]:
        """Run the plan on a field that notes its calls: they and validity are those of the run itself, said nowhere twice."""
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
    """The plan itself, or what its text says, on a grid shifted so."""
    return plan if isinstance(plan, Plan) else Plan.parse(plan, shift=shift)


def shifted_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """The uniform grid i / steps, with every noise level s = 1 - t moved to shift*s / (1 + (shift - 1)*s).

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
                _mark(text, at, f"plan must look like 'H1P5R3': letters of {known}, each with a count; got {text[at]!r}")
            )
        digits = found[2] or "1"
        if digits.startswith("0") or len(digits) > 4:
            raise ValueError(_mark(text, found.start(2), f"a count must be from 1 to {MAX_STEPS}, got {digits[:12]}"))
        if len(letters) + int(digits) > MAX_STEPS:
            raise ValueError(_mark(text, found.start(2), f"a plan must have 1 to {MAX_STEPS} steps"))
        letters += found[1] * int(digits)
        at = found.end()
    if not letters:
        raise ValueError("plan must look like 'H1P5R3', got an empty string")
    return letters


def _check_grid(grid: tuple[float, ...], steps: int, start: float) -> None:
    if len(grid) != steps + 1:
        raise ValueError(f"grid must hold {steps + 1} times, one more than the {steps} steps, got {len(grid)}")
    for i, (t0, t1) in enumerate(itertools.pairwise(grid)):
        if not t0 < t1:  # also catches NaN
            raise ValueError(f"grid must rise strictly, but grid[{i}] = {t0} is followed by grid[{i + 1}] = {t1}")
    if not 0 <= start < 1:
        raise ValueError(f"start must be at least 0 and less than 1, got {start}")
    if grid[0] != start or grid[-1] != 1:
        raise ValueError(f"grid must run from {start:g} to 1, got grid[0] = {grid[0]} and grid[{steps}] = {grid[-1]}")


def _mark(text: str, at: int, message: str) -> str:
    """The message with the text under it and a mark under the place."""
    shown = text if len(text) <= 60 else text[max(0, at - 30) : at + 30]
    column = at if len(text) <= 60 else min(at, 30)
    return f"{message}\n  {shown}\n  {' ' * column}^"
