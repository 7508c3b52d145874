"""Exponential integrators as steps: DPM-Solver++ 2M, UniPC-2 and RES of order 2.

With the noise level s = 1 - t and the denoised state D = x + s * v, the equation is dx/ds =
(x - D) / s. Its part in x is solved exactly, and D is taken to be linear in the logarithm of t / s
(D, U) or of s (X). Euler's method takes D to be constant, so it is their order 1.

For flow matching every such update is x plus weighted velocities and earlier states.

The orders of these steps hold between noise levels above 0 and below 1. From 0 to 1 the order is 2
up to a logarithm: at the ends, steps in log(t / s) do not get shorter as their number grows.
"""

from __future__ import annotations

import math

from torch import Tensor

from .state import Field, Move, PastVelocity, State, Step, euler

EARLIEST = 1e-6
"""Times below this count as this one where their logarithm is taken, as in diffusers."""


def log_snr(t: float) -> float:
    """log(t / (1 - t)), half the log of the signal-to-noise ratio; t in [0, 1)."""
    t = max(t, EARLIEST)
    return math.log(t) - math.log1p(-t)


def phi(k: int, z: float) -> float:
    """The function phi_k of exponential integrators, sum over n of z^n / (n + k)!.

    phi_0 is exp, and phi_k(z) = (phi_{k-1}(z) - 1 / (k-1)!) / z, which is inexact for a small z.
    """
    if abs(z) > 1:
        return math.exp(z) if k == 0 else (phi(k - 1, z) - 1 / math.factorial(k - 1)) / z
    return math.fsum(z**n / math.factorial(n + k) for n in range(20))


def extrapolation(earlier: PastVelocity | None, t0: float, t1: float) -> float:
    """The weight of D - D(earlier) in a step from t0 to t1 of order 2 (midpoint, bh2).

    0, which means order 1, without an earlier state, where the two can't be told apart, and in a
    step that ends at t = 1.
    """
    if earlier is None or t1 == 1:
        return 0.0
    gap = log_snr(t0) - log_snr(earlier.t)
    if gap <= 0:
        return 0.0
    return (t1 - t0) / (1 - t0) / 2 * (log_snr(t1) - log_snr(t0)) / gap


def correction(past: tuple[PastVelocity, ...], order: int, t: float) -> tuple[float, float]:
    """UniC's change of a state that UniP has predicted for time t, from the newest of the past.

    order: of UniP. Returns the weights of D - D1 and of D1 - D2, where D is at the predicted state,
    and D1 and D2 are the newest two of the past.
    """
    newest = past[-1].t
    share = (t - newest) / (1 - newest)
    if order == 1:
        return share / 2, 0.0
    h, before = log_snr(t) - log_snr(newest), log_snr(newest) - log_snr(past[-2].t)
    # The weights of the two differences make the update exact where D is quadratic.
    b0, b1 = phi(2, -h) / phi(1, -h), 2 * phi(3, -h) / phi(1, -h)
    of_past = (b0 - b1) / (1 + before / h)
    return share * (b0 - of_past), share * (of_past - 0.5) * h / before


def data_move(
    x: Tensor, t0: float, t1: float, own: float, earlier: list[tuple[PastVelocity, float]]
) -> Move:
    """Euler's update from t0 to t1, plus weighted denoised states.

    own: the weight of that at x, t0. earlier: others with their weights. All weights sum to 0.
    """
    dt, s = t1 - t0, 1 - t0
    if own == 0:
        return euler(x, dt)
    velocities, weights = [x], [own]
    for (t, v, state), weight in earlier:
        if weight != 0 and state is not None:
            velocities += [state, v]
            weights += [weight, weight * (1 - t)]
    return Move(x, dt + own * s, velocities, weights).within_one_kernel()


def kept(state: State) -> list[PastVelocity]:
    """The newest past velocities that have their states, at most two, the newest first."""
    return [point for point in state.past[:-3:-1] if point.x is not None]


class DpmSolver(Step):
    """DPM-Solver++ 2M: one predictor call (arXiv 2211.01095, algorithm 2).

    The variant "midpoint" of diffusers' DPMSolverMultistepScheduler. It reads the state and the
    velocity that the last step started with, of whatever kind that step was. Without one, and in a
    step that ends at t = 1, it is Euler's method.
    """

    letter, title, order = "D", "DPM-Solver++ 2M", 2

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        newest = next(iter(kept(state)), None)
        own = extrapolation(newest, t0, t1)
        earlier = [] if newest is None else [(newest, -own)]
        x, v0 = field.predict_and_move(state.x, t0, data_move(state.x, t0, t1, own, earlier))
        return State(x, None, state.remember(t0, v0))


class UniPC(Step):
    """UniPC-2: one predictor call (arXiv 2302.04867, algorithms 5 and 6).

    The predictor has order 2; with the corrector it is 3.

    The variant "bh2" of diffusers' UniPCMultistepScheduler, which predicts as DPM-Solver++ 2M does.
    After another U step, x is corrected first, by the velocity at the predicted x, which is what
    the step evaluates: so it costs no call. After a step of another kind there is nothing to
    correct. A step that ends at t = 1 is Euler's from the predicted x.
    """

    letter, title, order = "U", "UniPC-2", 3

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        points = kept(state)
        own = ahead = extrapolation(points[0] if points else None, t0, t1)
        before = 0.0
        if state.predicted:
            change, change_before = correction(state.past, state.predicted, t0)
            remains = (1 - t1) / (1 - t0)
            own, before = ahead + remains * change, remains * change_before
        earlier = list(zip(points, (before - own, -before), strict=False))
        x, v0 = field.predict_and_move(state.x, t0, data_move(state.x, t0, t1, own, earlier))
        return State(x, None, state.remember(t0, v0), predicted=2 if ahead else 1)


class Res(Step):
    """RES of order 2 with its second call halfway, res_2s: two predictor calls (arXiv 2308.02157).

    Halfway is meant in log(s): at the geometric mean of both noise levels. A step that ends at
    t = 1, where log(s) has no end, is Euler's with one call.
    """

    letter, title, order = "X", "RES 2S", 2

    def __call__(self, field: Field, state: State, t0: float, t1: float) -> State:
        dt, s0, s1 = t1 - t0, 1 - t0, 1 - t1
        if s1 == 0:
            x, v0 = field.predict_and_move(state.x, t0, euler(state.x, dt))
            return State(x, None, state.remember(t0, v0))
        h, middle = math.log(s0 / s1), math.sqrt(s0 * s1)
        weight = 2 * h * phi(2, -h) * middle
        ahead, v0 = field.predict_and_move(state.x, t0, euler(state.x, s0 - middle))
        move = Move(state.x, weight, [v0], [dt - weight])
        x, _ = field.predict_and_move(ahead, 1 - middle, move)
        return State(x, None, state.remember(t0, v0))
