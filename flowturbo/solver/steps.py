"""The kinds of solver step. A step is a value: (field, state, t0, t1) -> state.

Time runs from 0 (noise) to 1 (data), and dx/dt = v(x, t). H, P and R have the numerics of
FlowTurbo's public code. UniPC, DPM-Solver++ and RES are in exponential.py. To add a kind, write a
class and list it in STEPS.
"""

from __future__ import annotations

from fractions import Fraction

from .exponential import DpmSolver, Res, UniPC
from .state import (
    KEPT_STATES,
    MAX_PAST,
    Field,
    Move,
    NoCachedVelocity,
    PastVelocity,
    State,
    Step,
    euler,
    trapezoid,
)

__all__ = [
    "EXPONENTIAL",
    "FITTED",
    "KEPT_STATES",
    "MAX_PAST",
    "STEPS",
    "Field",
    "Move",
    "Multistep",
    "NoCachedVelocity",
    "PastVelocity",
    "State",
    "Step",
    "adams_bashforth_weights",
]


class Heun(Step):
    """Heun's method, of second order: two predictor calls (paper section 3.1).

    The second velocity is cached, as in the public code.
    """

    letter, title, order = "H", "Heun", 2

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        dt = t1 - t0
        ahead, v0 = field.predict_and_move(state.x, t0, euler(state.x, dt))
        x, v1 = field.predict_and_move(ahead, t1, trapezoid(state.x, v0, dt))
        return State(x, v1, state.remember(t0, v0))


class PseudoCorrector(Step):
    """Heun's method with the cached velocity as its first (paper section 3.3).

    One predictor call, and still of second order. Without a cached velocity it is a Heun step.
    """

    letter, title, order = "P", "pseudo corrector", 2

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        if state.v is None:
            return STEPS["H"](field, state, t0, t1)
        dt, v0 = t1 - t0, state.v
        x, v1 = field.predict_ahead_and_move(euler(state.x, dt), v0, t1, trapezoid(state.x, v0, dt))
        return State(x, v1, state.remember(t0, v0))


class Refiner(Step):
    """A Heun step on refined velocities: two refiner calls (paper section 3.2).

    As in the public code, both calls read the same cached velocity, the second offset is added to
    the first refined velocity, and the first refined velocity is cached. The second point makes the
    order 1 even with an exact refiner: the second velocity is off by the difference between the
    first refined velocity and the cached one, which is of the order of a step.
    """

    letter, title, order = "R", "refiner", 1

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        dt, cached = t1 - t0, state.newest_velocity
        if cached is None:
            raise NoCachedVelocity("R needs the velocity of an earlier step")
        ahead, v0 = field.refine_and_move(state.x, t0, cached, cached, euler(state.x, dt))
        x, _ = field.refine_and_move(ahead, t1, cached, v0, trapezoid(state.x, v0, dt))
        return State(x, v0, state.remember(t0, v0))


class SingleRefiner(Step):
    """The refiner step of the paper's equation 7.

    One refiner call, which reads the velocity of the previous grid time.
    """

    letter, title, order = "S", "refiner, equation 7", 1

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        if not state.past:
            raise NoCachedVelocity("S needs the velocity of an earlier step")
        before = state.past[-1].v
        x, v0 = field.refine_and_move(state.x, t0, before, before, euler(state.x, t1 - t0))
        return State(x, None, state.remember(t0, v0))


class Multistep(Step):
    """A linear multistep method: x plus weighted velocities of this and earlier steps.

    One call, of the predictor or, if `refines`, of the refiner. A refined velocity is the newest
    earlier one plus the refiner's offset.
    weights: for the step's own velocity and for earlier ones, newest first, times the step size, as
        `flowturbo tune` fits them. None: Adams-Bashforth of order k, which integrates the
        polynomial through the last k velocities over the step, on uneven grids too; k = 1 is
        Euler's method.
    With fewer than k velocities, Adams-Bashforth uses the order that they allow. A solution that
    starts so has order 2 at most, unless other steps come first.
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
        """The same step with these weights."""
        return Multistep(self.letter, self.title, self.order, refines=self.refines, weights=weights)

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        count = self.order if self.weights is None else len(self.weights)
        earlier = state.past[max(0, len(state.past) + 1 - count) :]
        if self.weights is None:
            *weights, weight = adams_bashforth_weights([*(s.t for s in earlier), t0], t0, t1)
        elif len(earlier) < count - 1:
            raise NoCachedVelocity(
                f"{self.letter} has weights of {count - 1} earlier velocities, but there are "
                f"{len(earlier)}"
            )
        else:
            *weights, weight = reversed(self.weights)
        move = Move(state.x, weight, [s.v for s in earlier], weights).within_one_kernel()
        if not self.refines:
            x, v0 = field.predict_and_move(state.x, t0, move)
        else:
            newest = state.newest_velocity
            if newest is None:
                raise NoCachedVelocity(f"{self.letter} needs the velocity of an earlier step")
            x, v0 = field.refine_and_move(state.x, t0, newest, newest, move)
        return State(x, None, state.remember(t0, v0))


def adams_bashforth_weights(times: list[float], t0: float, t1: float) -> list[float]:
    """The integrals over [t0, t1] of the Lagrange polynomials on `times`.

    times: distinct. Returns the weight of each velocity. They are computed in rational arithmetic
    and rounded once: times (0, 1) and the step [1, 2] give (-1/2, 3/2).
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
        UniPC(),
        DpmSolver(),
        Res(),
        Multistep("L", "fitted multistep", 4),
        Multistep("M", "fitted multistep, refined", 4, refines=True),
    )
}

EXPONENTIAL = "UDX"
"""The letters of exponential integrators, which need noise levels from 0 to 1."""
FITTED = "LM"
"""The letters of steps that use the weights of a plan, if it has any."""
