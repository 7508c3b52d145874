"""What a step is, and what it reads and leaves: fields, moves and states.

Time runs from 0 (noise) to 1 (data), and dx/dt = v(x, t).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from flowturbo_kernels import velocity_update
from flowturbo_kernels.velocity_update import MAX_VELOCITIES


class Move(NamedTuple):
    """An update of the state by a velocity v that is not evaluated yet.

    x becomes origin + sum(weights * velocities) + weight * v. The weights include the step size.
    origin: (N, ...). Of v and of each of the velocities, the first N rows are read.
    """

    origin: Tensor
    weight: float
    velocities: Sequence[Tensor] = ()
    weights: Sequence[float] = ()

    def by(self, v: Tensor) -> Tensor:
        """The updated x, (N, ...)."""
        return velocity_update(self.origin, [*self.velocities, v], [*self.weights, self.weight])

    def within_one_kernel(self) -> Move:
        """The same move with at most MAX_VELOCITIES velocities; the others are added now."""
        origin, velocities, weights = self.origin, self.velocities, self.weights
        while len(velocities) > MAX_VELOCITIES:
            origin = velocity_update(origin, velocities[:MAX_VELOCITIES], weights[:MAX_VELOCITIES])
            velocities, weights = velocities[MAX_VELOCITIES:], weights[MAX_VELOCITIES:]
        return Move(origin, self.weight, velocities, weights)


def euler(x: Tensor, dt: float) -> Move:
    """Euler's update, x + dt * v."""
    return Move(x, dt)


def trapezoid(x: Tensor, v0: Tensor, dt: float) -> Move:
    """The trapezoidal rule, x + dt/2 * (v0 + v)."""
    return Move(x, dt / 2, [v0], [dt / 2])


class Field(ABC):
    """What a step asks of a model. Guidance, labels and dtypes are handled by the field.

    A subclass defines `predict` and `refine`, or overrides the other two to fuse each evaluation
    with the move that follows it.
    """

    @abstractmethod
    def predict(self, x: Tensor, t: float) -> Tensor:
        """The velocity at (x, t).

        x: (N, ...). t: in [0, 1].
        Returns N rows, or 2N with both halves of guidance, the conditional one first.
        """

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        """The refiner's offset at (x, t), to be added to a velocity; of v's shape.

        x: (N, ...). t: in [0, 1]. v: as `predict` returns it.
        """
        raise ValueError("this plan has refiner steps, but the field has no refiner")

    def predict_and_move(self, x: Tensor, t: float, move: Move) -> tuple[Tensor, Tensor]:
        """Evaluate v = predict(x, t) and move by it -> (the new x, v)."""
        v = self.predict(x, t)
        return move.by(v), v

    def predict_ahead_and_move(
        self, ahead: Move, v0: Tensor, t: float, move: Move
    ) -> tuple[Tensor, Tensor]:
        """`predict_and_move` at the state that `ahead` leads to by v0."""
        return self.predict_and_move(ahead.by(v0), t, move)

    def refine_and_move(
        self, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move
    ) -> tuple[Tensor, Tensor]:
        """Evaluate v = base + refine(x, t, read), move by it -> (the new x, v)."""
        v = base + self.refine(x, t, read)
        return move.by(v), v


class PastVelocity(NamedTuple):
    """A velocity, and the grid time of the state it was evaluated for.

    x: that state, (N, ...); None for all but the newest KEPT_STATES.
    """

    t: float
    v: Tensor
    x: Tensor | None = None


class State(NamedTuple):
    """What passes from step to step.

    x: (N, ...). Under guidance every velocity has 2N rows, of which the first N move x.
    v: the cached velocity, or None if the last step left none. It stands for the velocity at the
        present (x, t), but was evaluated at the predicted x (H, P) or at the start of the step (R).
    past: velocities at earlier grid times, at most MAX_PAST, the newest last.
    predicted: the order of UniPC's predictor that led to x, which its corrector must know; 0 after
        any other step.
    """

    x: Tensor
    v: Tensor | None = None
    past: tuple[PastVelocity, ...] = ()
    predicted: int = 0

    @property
    def newest_velocity(self) -> Tensor | None:
        """The cached velocity if there is one, else the newest of the past."""
        if self.v is not None:
            return self.v
        return self.past[-1].v if self.past else None

    def remember(self, t: float, v: Tensor) -> tuple[PastVelocity, ...]:
        """The past with the present x and its velocity; the oldest is dropped at MAX_PAST."""
        past = (*self.past, PastVelocity(t, v, self.x))[-MAX_PAST:]
        older = (point._replace(x=None) for point in past[:-KEPT_STATES])
        return (*older, *past[-KEPT_STATES:])


MAX_PAST = 15
"""Past velocities that are kept: Adams-Bashforth reads up to three, fitted steps may read all."""
KEPT_STATES = 2
"""How many of them keep their states: UniPC-2 reads two."""


class NoCachedVelocity(ValueError):
    """A step needs a velocity of an earlier step, and there is none."""


class Step(ABC):
    """One kind of step.

    letter: its name in a plan. title: its name in tables. order: its order of convergence, with an
        exact field and an exact past.
    """

    letter: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int]

    @abstractmethod
    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State: ...
