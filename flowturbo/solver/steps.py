"""The kinds of solver step. A step is a value: (field, state, t0, t1) -> state. Add one by adding a
class to STEPS.

Time runs from 0 (noise) to 1 (data), dx/dt = v(x, t). Numerics of H, P and R are those of
FlowTurbo's public code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, NamedTuple

from torch import Tensor

from flowturbo_kernels import velocity_update
from flowturbo_kernels.velocity_update import MAX_VELOCITIES


class Move(NamedTuple):
    """How the state moves by a velocity v that is still to be evaluated: to origin + sum(weights *
    velocities) + weight * v.

    origin (N, ...); of v and of each of velocities the first N rows are read; weights hold the step
    size.
    """

    origin: Tensor
    weight: float
    velocities: Sequence[Tensor] = ()
    weights: Sequence[float] = ()

    def by(self, v: Tensor) -> Tensor:
        return velocity_update(self.origin, [*self.velocities, v], [*self.weights, self.weight])


def euler(x: Tensor, dt: float) -> Move:
    """x + dt * v."""
    return Move(x, dt)


def trapezoid(x: Tensor, v0: Tensor, dt: float) -> Move:
    """x + dt/2 * (v0 + v)."""
    return Move(x, dt / 2, [v0], [dt / 2])


class Field(ABC):
    """What a step may ask of a model. Guidance, labels and dtypes are the field's business.

    A model says what predict and refine are, or fuses each with the move that follows it by
    overriding the other two.
    """

    @abstractmethod
    def predict(self, x: Tensor, t: float) -> Tensor:
        """x (N, ...), t in [0, 1] -> the velocity at (x, t): N rows, or 2N with both guidance
        halves, conditional first.
        """

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        """x (N, ...), t, v as `predict` gives it -> the refiner's offset, of v's shape, to be added
        to a velocity.
        """
        raise ValueError("this plan has refiner steps, but the field has no refiner")

    def predict_and_move(self, x: Tensor, t: float, move: Move) -> tuple[Tensor, Tensor]:
        """v = predict(x, t) -> (where the move by v ends, v)."""
        v = self.predict(x, t)
        return move.by(v), v

    def refine_and_move(
        self, x: Tensor, t: float, read: Tensor, base: Tensor, move: Move
    ) -> tuple[Tensor, Tensor]:
        """v = base + refine(x, t, read) -> (where the move by v ends, v)."""
        v = base + self.refine(x, t, read)
        return move.by(v), v


class PastVelocity(NamedTuple):
    """A velocity and the grid time of the state it was evaluated for."""

    t: float
    v: Tensor


class State(NamedTuple):
    """What passes between steps: x has N rows; under guidance every velocity has 2N, of which the
    first N move x.

    v: the velocity that stands for the present (x, t), although it was evaluated at the predictor's
       x (H, P) or is the one that a refiner step started with (R); None when the last step left
       none.
    past: velocities at earlier grid times, the newest last, at most MAX_PAST.
    """

    x: Tensor
    v: Tensor | None = None
    past: tuple[PastVelocity, ...] = ()

    @property
    def newest_velocity(self) -> Tensor | None:
        """The cached velocity if there is one, else the newest of the past."""
        if self.v is not None:
            return self.v
        return self.past[-1].v if self.past else None


MAX_PAST = 15
"""Adams-Bashforth reads three at most; fitted steps may read all."""


class NoCachedVelocity(ValueError):
    """A step needs a velocity of an earlier step and there is none."""


def remember(past: tuple[PastVelocity, ...], t: float, v: Tensor) -> tuple[PastVelocity, ...]:
    return (*past, PastVelocity(t, v))[-MAX_PAST:]


class Step(ABC):
    """One kind of step. letter: its sign in a plan; order: of convergence, with an exact field and
    past; title: for tables.
    """

    letter: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int]

    @abstractmethod
    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State: ...


class Heun(Step):
    """Heun's method, second order: two predictor calls; caches the second velocity (public code;
    paper section 3.1).
    """

    letter, title, order = "H", "Heun", 2

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        dt = t1 - t0
        ahead, v0 = field.predict_and_move(state.x, t0, euler(state.x, dt))
        x, v1 = field.predict_and_move(ahead, t1, trapezoid(state.x, v0, dt))
        return State(x, v1, remember(state.past, t0, v0))


class PseudoCorrector(Step):
    """Heun's method whose first velocity is the cached one: one predictor call, still second order
    (paper section 3.3).

    Without a cache (as the first step, or after a step that leaves none) it evaluates the first
    velocity too.
    """

    letter, title, order = "P", "pseudo corrector", 2

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        if state.v is None:
            return STEPS["H"](field, state, t0, t1)
        dt, v0 = t1 - t0, state.v
        x, v1 = field.predict_and_move(euler(state.x, dt).by(v0), t1, trapezoid(state.x, v0, dt))
        return State(x, v1, remember(state.past, t0, v0))


class Refiner(Step):
    """A Heun step whose velocities are the cached one plus refiner offsets: two refiner calls
    (paper section 3.2).

    As in the public code: both calls read the same cached velocity, the second offset is added to
    the first refined velocity, and that first one is passed on. Because of the second point the
    order is 1 even with an exact refiner: its second velocity is off by the difference between the
    first one and the cache, which is of the size of a step.
    """

    letter, title, order = "R", "refiner", 1

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        dt, cached = t1 - t0, state.newest_velocity
        if cached is None:
            raise NoCachedVelocity("R needs the velocity of an earlier step")
        ahead, v0 = field.refine_and_move(state.x, t0, cached, cached, euler(state.x, dt))
        x, _ = field.refine_and_move(ahead, t1, cached, v0, trapezoid(state.x, v0, dt))
        return State(x, v0, remember(state.past, t0, v0))


class SingleRefiner(Step):
    """The refiner step as the paper's equation 7 writes it: one call, reading the velocity of one
    grid time before.
    """

    letter, title, order = "S", "refiner, equation 7", 1

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        if not state.past:
            raise NoCachedVelocity("S needs the velocity of an earlier step")
        before = state.past[-1].v
        x, v0 = field.refine_and_move(state.x, t0, before, before, euler(state.x, t1 - t0))
        return State(x, None, remember(state.past, t0, v0))


class Multistep(Step):
    """x plus weighted velocities of this step and of steps before it: one call, of the predictor
    or, where it refines, the refiner.

    A refined velocity is the newest one of before plus the refiner's offset from it. weights: of
    the step's own velocity and of those before it, newest first, with the step size in them: what
    `flowturbo tune` fits. None: k-step Adams-Bashforth, which integrates the polynomial through the
    last k velocities over the step, on uneven grids too; k = 1 is Euler's method. With fewer than k
    velocities at hand it starts at the order they allow, which for a whole solution leaves order 2
    at most unless other steps come first.
    """

    def __init__(
        self,
        letter: str,
        title: str,
        k: int,
        *,
        refines: bool = False,
        weights: tuple[float, ...] | None = None,
    ) -> None:
        self.letter, self.title, self.order = letter, title, k  # type: ignore[misc]
        self.refines, self.weights = refines, weights

    def weighted(self, weights: tuple[float, ...]) -> Multistep:
        """The same with these weights."""
        return Multistep(self.letter, self.title, self.order, refines=self.refines, weights=weights)

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        wanted = self.order if self.weights is None else len(self.weights)
        earlier = state.past[max(0, len(state.past) + 1 - wanted) :]
        if self.weights is None:
            *weights, weight = adams_bashforth_weights([*(s.t for s in earlier), t0], t0, t1)
        elif len(earlier) < wanted - 1:
            raise NoCachedVelocity(
                f"{self.letter} has weights of {wanted - 1} earlier velocities, but there are "
                f"{len(earlier)}"
            )
        else:
            *weights, weight = reversed(self.weights)
        origin, velocities = state.x, [s.v for s in earlier]
        while len(velocities) > MAX_VELOCITIES:  # kernels take so many at a time
            origin = velocity_update(origin, velocities[:MAX_VELOCITIES], weights[:MAX_VELOCITIES])
            velocities, weights = velocities[MAX_VELOCITIES:], weights[MAX_VELOCITIES:]
        move = Move(origin, weight, velocities, weights)
        if not self.refines:
            x, v0 = field.predict_and_move(state.x, t0, move)
        else:
            newest = state.newest_velocity
            if newest is None:
                raise NoCachedVelocity(f"{self.letter} needs the velocity of an earlier step")
            x, v0 = field.refine_and_move(state.x, t0, newest, newest, move)
        return State(x, None, remember(state.past, t0, v0))


def adams_bashforth_weights(times: list[float], t0: float, t1: float) -> list[float]:
    """Integrals over [t0, t1] of the Lagrange polynomials on `times` (distinct): the weight of each
    velocity.

    Exact in rational arithmetic, then rounded once: on the grid (0, 1) and the step [1, 2] they are
    (-1/2, 3/2).
    """
    nodes = [Fraction(t) for t in times]
    weights = []
    for i, node in enumerate(nodes):
        coefficients = [Fraction(1)]  # of the Lagrange polynomial, lowest power first
        for j, other in enumerate(nodes):
            if j != i:
                shifted = [Fraction(0), *coefficients]
                lowered = [*(c * other for c in coefficients), Fraction(0)]
                coefficients = [
                    (s - c) / (node - other) for s, c in zip(shifted, lowered, strict=True)
                ]
        a, b = Fraction(t0), Fraction(t1)
        weights.append(
            float(
                sum(c * (b ** (n + 1) - a ** (n + 1)) / (n + 1) for n, c in enumerate(coefficients))
            )
        )
    return weights


STEPS: dict[str, Step] = {
    step.letter: step
    for step in (
        Heun(),
        PseudoCorrector(),
        Refiner(),
        SingleRefiner(),
        Multistep("E", "Euler", 1),
        Multistep("A", "Adams-Bashforth 2", 2),
        Multistep("B", "Adams-Bashforth 3", 3),
        Multistep("C", "Adams-Bashforth 4", 4),
        Multistep("L", "fitted multistep", 4),
        Multistep("M", "fitted multistep, refined", 4, refines=True),
    )
}

FITTED = "LM"
"""Letters of the steps that take their weights from the plan, if it has any."""
