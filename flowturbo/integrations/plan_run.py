"""One pass through a plan, fed with velocities one by one.

A pipeline evaluates its network itself, so the steps of the plan can't call it: they are replayed
with the velocities that are known, until one is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..solver.steps import Field, State, Step


class Refine(Protocol):
    """A refiner that knows the arguments of the predictor's last call."""

    def __call__(self, x: Tensor, noise_level: float, v: Tensor) -> Tensor:
        """x (N, ...), velocity v like x -> the refiner's offset, like x."""
        ...

    def observe(self, v: Tensor) -> None:
        """A velocity as the pipeline gave it, before the step that takes it."""
        ...

    def stepped(self) -> None:
        """The scheduler has finished a step."""
        ...

    def reset(self) -> None:
        """A new run begins: what an earlier one left is void."""
        ...

    def end(self) -> None:
        """The run has ended, or the pipeline's call has failed."""
        ...


class Point(NamedTuple):
    """A predictor call: the number of its step, and its time."""

    step: int
    time: float


class _VelocityNeeded(Exception):
    """A step needs the predictor's velocity at x and t."""

    def __init__(self, x: Tensor, t: float) -> None:
        super().__init__()
        self.x, self.t = x, t


class _KnownVelocities(Field):
    """A field that answers predictor calls with velocities that are known already."""

    def __init__(self, velocities: Sequence[Tensor], refine: Refine | None) -> None:
        self._unread, self._refine = list(velocities), refine

    def predict(self, x: Tensor, t: float) -> Tensor:
        if not self._unread:
            raise _VelocityNeeded(x, t)
        return self._unread.pop(0)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        if self._refine is None:
            raise ValueError("this plan has refiner steps: give accelerate a refiner")
        return self._refine(x, 1 - t, v)


def steps_on(steps: Sequence[Step], times: Sequence[float]) -> list[Step]:
    """The steps of a plan on this grid.

    Some schedulers end in a step of no length (final_sigmas_type="sigma_min"), and levels that are
    given may repeat: there x stays, but for what UniPC corrects in the last step.
    """
    last = len(steps) - 1
    return [
        _Stay()
        if times[i] == times[i + 1] and (step.letter != "U" or i < last or times[i] == 1)
        else step
        for i, step in enumerate(steps)
    ]


class _Stay(Step):
    """A step of no length: one predictor call, which changes nothing."""

    letter, title, order = "", "no step", 1

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        field.predict(state.x, t0)
        return state


def predictor_calls(steps: Sequence[Step], times: Sequence[float]) -> list[Point]:
    """Every predictor call of the steps on this grid, in order."""
    points: list[Point] = []

    class CallRecorder(Field):
        def predict(self, x: Tensor, t: float) -> Tensor:
            points.append(Point(number, t))
            return x

        def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
            return v

    state = State(torch.zeros(1, dtype=torch.float32, device="cpu"))
    for number, step in enumerate(steps_on(steps, times)):
        state = step(CallRecorder(), state, times[number], times[number + 1])
    return points


class Run:
    """One pass through a plan, from its call `first` on.

    It takes velocities one by one, and says where the next one must be evaluated: at `position`.
    x: where it starts; the run keeps a copy, so that it may be written to.
    dtype: of the latents that the pipeline gets.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        times: Sequence[float],
        first: int,
        x: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.steps, self.times, self.dtype = steps_on(steps, times), times, dtype
        self.step, time = predictor_calls(steps, times)[first]
        # A run that starts within a step has no earlier velocity of it. The velocity that comes
        # leads to the step's end, if that is still ahead, and is the cached one of the next step.
        self.within_a_step = time != times[self.step]
        self._rest = times[self.step + 1] - time
        self.position = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        self.state, self._known = State(self.position), list[Tensor]()
        self._given: tuple[Tensor, int] | None = None

    def give(self) -> Tensor:
        """The position for the pipeline, in its dtype: a tensor that the run does not keep."""
        given = self.position.to(self.dtype, copy=True)
        self._given = given, version_of(given)
        return given

    def adopt(self, sample: Tensor) -> bool:
        """Apply to the state what the pipeline or a callback has changed in the latents.

        sample: the latents as the pipeline passes them to the next step.
        Returns False if they have another shape, so that the run can't go on.
        """
        if sample.shape != self.position.shape:
            return False
        if self._given is None:
            return True
        given, version = self._given
        if sample is given and version >= 0 and version_of(sample) == version:
            return True
        wide = self.position.dtype
        change = sample.to(wide) - self.position.to(self.dtype).to(wide)
        self.state = self.state._replace(x=self.state.x + change)
        self.position = self.position + change
        return True

    def take(self, v: Tensor, refine: Refine | None) -> None:
        """Take the velocity at `position`, and move on to where the next one is needed.

        v: in the state's dtype, and not written to later.
        """
        if self.within_a_step:
            x = self.state.x + self._rest * v if self._rest else self.state.x
            cached = None if self._rest else v  # it is that of another time
            self.state, self.step, self.within_a_step = State(x, cached), self.step + 1, False
        else:
            self._known.append(v)
        while self.step < len(self.steps):
            t0, t1 = self.times[self.step], self.times[self.step + 1]
            try:
                self.state = self.steps[self.step](
                    _KnownVelocities(self._known, refine), self.state, t0, t1
                )
            except _VelocityNeeded as request:
                self.position = request.x
                return
            self.step, self._known = self.step + 1, []
        self.position = self.state.x


def version_of(x: Tensor) -> int:
    """How often x was written to; -1 if that is not counted."""
    return -1 if x.is_inference() else x._version
