"""Plans: which steps to take, at which times, and where to apply guidance.

A plan is a frozen value that can be printed, compared and hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..checks import finite, numbers_of
from ..storage.files import write_text
from .plan_file import FORMAT, ONLY_WITH_STAGES, plan_entries, read_contents
from .plan_text import MAX_STEPS, expand, has_stages, marked
from .steps import FITTED, MAX_PAST, STEPS, Field, Multistep, NoCachedVelocity, State, Step

__all__ = ["MAX_STEPS", "Call", "Cost", "Plan", "as_plan", "shifted_grid"]

_RECORD = ("letters", "grid", "guidance_interval", "weights")


class Call(NamedTuple):
    """One evaluation of a network.

    refiner: True for the refiner, False for the predictor.
    t: the time.
    guided: whether both halves are evaluated if guidance is on.
    """

    refiner: bool
    t: float
    guided: bool


class Cost(NamedTuple):
    """The number of calls of a plan, by network (NFE).

    guided_predictor, guided_refiner: those of them that evaluate both halves if guidance is on.
    """

    predictor: int
    refiner: int
    guided_predictor: int
    guided_refiner: int


@dataclass(frozen=True)
class Plan:
    """A sequence of steps on a time grid from 0 (noise) to 1 (data).

    letters: one letter per step, each in STEPS: H Heun, P pseudo corrector, R refiner, S refiner of
        the paper's equation 7, E Euler, A, B, C Adams-Bashforth of order 2, 3, 4, U UniPC-2,
        D DPM-Solver++ 2M, X res_2s, L linear multistep with the plan's weights, M the same on
        refined velocities.
    grid: the len(letters) + 1 times, strictly rising, from `start` to `end`.
    guidance_interval: guidance is applied to calls at times in this closed interval; outside it
        only the conditional half is evaluated.
    start: where the grid starts. It is 0, except for editing, which starts on the path between
        noise and a source (see `starting_at`).
    weights: one row for each L and M step, in order: the weights of its own velocity and of earlier
        ones, newest first, times the step size, as `flowturbo tune` fits them. No rows at all: the
        weights of Adams-Bashforth of order 4.
    end: where the grid ends. It is 1, except for a stage that another one follows (see `between`).
    calls: the evaluations that a run makes, in order.
    Raises ValueError for an unknown letter, for a step that needs a velocity that no earlier step
    left, each with a mark under the letter, and for a grid that does not rise from `start` to
        `end`.
    `Plan.parse` reads a plan from text, `Plan.load` from a file.
    """

    letters: str
    grid: tuple[float, ...]
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    start: float = 0.0
    weights: tuple[tuple[float, ...], ...] = ()
    end: float = field(default=1.0, repr=False)  # the grid shows it
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
                    marked(
                        self.letters,
                        i,
                        f"no step is called {letter!r}; there are {', '.join(STEPS)}",
                    )
                )
        if not 1 <= len(self.letters) <= MAX_STEPS:
            raise ValueError(f"a plan must have 1 to {MAX_STEPS} steps, got {len(self.letters)}")
        _check_grid(self.grid, len(self.letters), self.start, self.end)
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
        """A plan from text such as "H1P5R3".

        text: letters, each with a count of at least 1 (left out: 1), in the order they run.
        grid: the times, strictly rising from 0 to 1, one more than there are steps; None: uniform,
            then shifted.
        shift: above 0, as in SD3: the noise level s = 1 - t becomes shift*s / (1 + (shift - 1)*s).
            A shift above 1 puts more steps at the noisy end.
        Raises ValueError or TypeError for text or numbers that make no plan.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"plan must be a string like 'H1P5R3' or a Plan, got {type(text).__name__}"
            )
        letters = expand(text)
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
        """The plan that `record` returned."""
        letters, grid, interval, weights = (record[name] for name in _RECORD)
        return cls(letters, grid, interval, weights=weights)

    def record(self) -> dict[str, Any]:
        """The plan as values that JSON can hold, for reports."""
        return {name: getattr(self, name) for name in _RECORD}

    def starting_at(self, t: float) -> Plan:
        """The same steps on the grid compressed into [t, 1], 0 <= t < 1.

        All steps are kept, so any plan can start anywhere. Weights are scaled with the step sizes,
        although they were fitted to the whole interval.
        """
        if not 0 <= finite("t", t) < 1:
            raise ValueError(f"t must be at least 0 and less than 1, got {t}")
        return self.between(t, 1.0)

    def between(self, start: float, end: float) -> Plan:
        """The same steps on the grid compressed into [start, end], 0 <= start < end <= 1.

        As `starting_at`, whose end is 1.
        """
        if not 0 <= finite("start", start) < finite("end", end) <= 1:
            raise ValueError(f"start and end must be 0 <= start < end <= 1, got {start} and {end}")
        first, last = self.grid[0], self.grid[-1]
        grid = [start + (end - start) * (time - first) / (last - first) for time in self.grid]
        scale = (end - start) / (last - first)
        weights = tuple(tuple(scale * weight for weight in row) for row in self.weights)
        times = (start, *grid[1:-1], end)
        return Plan(self.letters, times, self.guidance_interval, start, weights, end)

    @classmethod
    def from_contents(cls, contents: Any) -> Plan:
        """The plan that a file of `save` holds, read from JSON.

        Raises ValueError or TypeError for anything else.
        """
        entries = plan_entries(contents)
        return cls.from_record({**entries, "letters": expand(entries["plan"])})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file that `save` wrote.

        Raises ValueError, naming the file and what is wrong with it, for any other file.
        """
        try:
            return cls.from_contents(read_contents(Path(path)))
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is no plan file: {error}") from None

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the plan as a .json file, atomically.

        about: notes for readers of the file.
        Raises ValueError for another suffix, and for a plan that does not run from 0 to 1.
        """
        if Path(path).suffix != ".json":
            raise ValueError(f"path must end in .json, got {str(path)!r}")
        if self.start:
            raise ValueError(
                f"a plan must start at 0 to be saved, got one that starts at {self.start:g}"
            )
        if self.end != 1:
            raise ValueError(f"a plan must end at 1 to be saved, got one that ends at {self.end:g}")
        entries = {"format": FORMAT, "plan": str(self), **self.record(), "about": dict(about or {})}
        del entries["letters"]
        write_text(path, json.dumps(entries, indent=1, allow_nan=False) + "\n")

    def __str__(self) -> str:
        """The letters with counts, e.g. "H1P5R3", as `parse` reads them.

        Grid, interval and weights are in the repr only.
        """
        return "".join(
            f"{letter}{len(list(run))}" for letter, run in itertools.groupby(self.letters)
        )

    @property
    def name(self) -> str:
        """The letters with counts, and a digest of everything else unless it is the default."""
        if self == Plan.parse(str(self)):
            return str(self)
        return f"{self}-{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}"

    def __len__(self) -> int:
        return len(self.letters)

    def schedule(self) -> Iterator[tuple[Step, float, float]]:
        """Each step with its times: (step, t0, t1), in order."""
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
        """Whether a call at time t applies guidance, if guidance is on."""
        low, high = self.guidance_interval
        return low <= t <= high

    @property
    def cost(self) -> Cost:
        """The number of calls, by network."""
        predictor, refiner = (
            [c for c in self.calls if c.refiner == which] for which in (False, True)
        )
        return Cost(
            len(predictor),
            len(refiner),
            sum(c.guided for c in predictor),
            sum(c.guided for c in refiner),
        )

    @property
    def calls_at_data(self) -> bool:
        """Whether the predictor is called at time 1, where there is no noise: H and P steps do."""
        return any(call.t == 1 and not call.refiner for call in self.calls)

    def _rehearse(self) -> tuple[Call, ...]:
        """Run the plan on a field that records its calls.

        So the calls of a plan, and whether it is valid, follow from the steps themselves.
        """
        recorder = _CallRecorder(self)
        state = State(torch.zeros(1, dtype=torch.float32, device="cpu"))
        for i, (step, t0, t1) in enumerate(self.schedule()):
            try:
                state = step(recorder, state, t0, t1)
            except NoCachedVelocity as error:
                raise ValueError(marked(self.letters, i, str(error))) from None
        return tuple(recorder.calls)


class _CallRecorder(Field):
    """A field that records its calls."""

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
    """A Plan as it is, or the plan of a text or of a .json file.

    shift: of the grid of a plan given as text, as in `Plan.parse`.
    Raises ValueError also for a plan with stages, and for a part of one.
    """
    if isinstance(plan, Plan):
        if plan.end != 1:
            raise ValueError(f"plan must end at 1, got one that ends at {plan.end:g}")
        return plan
    if isinstance(plan, str) and plan.endswith(".json"):
        return Plan.load(plan)
    if has_stages(plan) if isinstance(plan, str) else hasattr(plan, "stages"):
        raise ValueError(f"plan {str(plan)!r} has stages: {ONLY_WITH_STAGES}")
    return Plan.parse(plan, shift=shift)


def shifted_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """The uniform grid i / steps, shifted as in SD3; steps + 1 times.

    The noise level s = 1 - t becomes shift*s / (1 + (shift - 1)*s). In terms of t this is t / (t +
    shift * (1 - t)), which is exact at both ends.
    """
    times = [i / steps for i in range(steps + 1)]
    return tuple(times if shift == 1 else [t / (t + shift * (1 - t)) for t in times])


def _check_grid(grid: tuple[float, ...], steps: int, start: float, end: float) -> None:
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
    if not start < end <= 1:
        raise ValueError(f"end must be above {start:g} and at most 1, got {end}")
    if grid[0] != start or grid[-1] != end:
        raise ValueError(
            f"grid must run from {start:g} to {end:g}, got grid[0] = {grid[0]} and grid[{steps}] = "
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
