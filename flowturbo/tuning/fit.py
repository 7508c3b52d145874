"""Fitting a plan: the times of its steps, and the weights of its L and M steps, to the fine
solution from the same noise.

Every published solver that makes one call a step is of this form: it calls the model at a point
that is the noise plus weighted velocities of earlier calls. So are Heun's method, as two such
steps, and Adams-Bashforth, UniPC and DPM-Solver++, whose weights come from a Taylor series. Here
they come from what the model does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..solver.plan import Plan
from ..solver.steps import FITTED, MAX_PAST, Field, State, adams_bashforth_weights


class Batch(NamedTuple):
    """Images to fit to. field: plan -> what its steps ask, for these images; noise (N, ...); fine:
    where the fine solution ends.
    """

    field: Callable[[Plan], Field]
    noise: Tensor
    fine: Tensor


Advance = Callable[[float], object]
"""Told how many predictor calls of how many images have been made, as a product, since it was last
told.
"""


def weighted(plan: Plan, order: int) -> Plan:
    """A plan of L and M steps with weights for all velocities there are: those of Adams-Bashforth
    of that order, and zeros.
    """
    if set(plan.letters) - set(FITTED):
        raise ValueError(f"plan must be of {' and '.join(FITTED)} steps alone, got {plan}")
    if len(plan) > MAX_PAST + 1:
        raise ValueError(
            f"plan must have at most {MAX_PAST + 1} steps to use every velocity in each, got "
            f"{len(plan)}"
        )
    rows = []
    for i, (t0, t1) in enumerate(itertools.pairwise(plan.grid)):
        newest = adams_bashforth_weights(list(plan.grid[max(0, i + 1 - order) : i + 1]), t0, t1)[
            ::-1
        ]
        rows.append((*newest, *(0.0,) * (i + 1 - len(newest))))
    return Plan(plan.letters, plan.grid, plan.guidance_interval, weights=tuple(rows))


def inserted(plan: Plan, at: int, letter: str) -> Plan:
    """The weighted plan with one more call before step `at` (from 1 on; len(plan): after the last),
    in the middle of the two times.

    All its weights, and those of its velocity, are zero: what the plan computes stays the same,
    until it is fitted.
    """
    time = (
        (plan.grid[at - 1] + plan.grid[at]) / 2 if at < len(plan) else (plan.grid[at - 1] + 1) / 2
    )
    rows = []
    for i, row in enumerate(plan.weights):
        if i == at:
            rows.append((0.0,) * (at + 1))
        # Newest first: of step i's velocities, i + 1 - at are of step `at` and later.
        rows.append(row if i < at else (*row[: i + 1 - at], 0.0, *row[i + 1 - at :]))
    if at == len(plan):
        rows.append((0.0,) * (at + 1))
    letters = plan.letters[:at] + letter + plan.letters[at:]
    return Plan(
        letters,
        (*plan.grid[:at], time, *plan.grid[at:]),
        plan.guidance_interval,
        weights=tuple(rows),
    )


@torch.no_grad()
def rms_error(plan: Plan, batches: Sequence[Batch], advance: Advance = lambda calls: None) -> float:
    """Root of the mean square of (result - fine) over all values of all batches; infinite where a
    result is NaN or infinite.
    """
    total = values = 0.0
    for batch in batches:
        x = _states(plan, batch)[-1].x
        total += float((x - batch.fine).double().square().sum())
        values += x.numel()
        advance(len(x) * plan.cost.predictor)
    return math.sqrt(total / values) if math.isfinite(total) else math.inf


@torch.no_grad()
def fit_weights(
    plan: Plan,
    batches: Sequence[Batch],
    *,
    iterations: int = 10,
    least_gain: float = 0.003,
    advance: Advance = lambda calls: None,
) -> Plan:
    """A plan of the same letters and cost whose error on these batches is at most that of `plan`.

    Free are the inner times, which keep their order, and the weights that `plan` gives. Damped
    Gauss-Newton (Levenberg-Marquardt), with derivatives by differences: no gradient of the model is
    needed, and any field will do. iterations: at most so many; it ends before where one lowers the
    error by a smaller share than `least_gain`.
    """
    best, damping = rms_error(plan, batches, advance), 1e-4
    for _ in range(iterations):
        curvature, slope = _normal_equations(plan, batches, advance)
        scale = curvature.diagonal().clamp(min=1e-8 * float(curvature.diagonal().max()))
        before = best
        for _ in range(8):
            moved = _moved(plan, torch.linalg.solve(curvature + damping * scale.diag(), slope))
            found = math.inf if moved is None else rms_error(moved, batches, advance)
            if moved is not None and found < best:
                plan, best, damping = moved, found, max(damping / 10, 1e-9)
                break
            damping = max(10 * damping, 1e-4)
        if before - best <= least_gain * before:
            break
    return plan


_TIME, _WEIGHT = 2e-3, 2e-3
"""Differences of a time, and of a weight. In float32 rounding then makes an error of a thousandth,
like the second derivative.
"""


def _states(plan: Plan, batch: Batch, first: int = 0, start: State | None = None) -> list[State]:
    """The states before step `first` and after every step from there on."""
    states, field = [State(batch.noise) if start is None else start], batch.field(plan)
    for step, t0, t1 in itertools.islice(plan.schedule(), first, None):
        states.append(step(field, states[-1], t0, t1))
    return states


def _normal_equations(
    plan: Plan, batches: Sequence[Batch], advance: Advance
) -> tuple[Tensor, Tensor]:
    """J'J and J'r in float64, with J the derivative of the results by the parameters and r = fine -
    result.
    """
    count = len(plan) - 1 + sum(map(len, plan.weights))
    curvature, slope = (
        torch.zeros(count, count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.float64),
    )
    for batch in batches:
        states = _states(plan, batch)
        J = torch.stack(_derivatives(plan, batch, states, advance)).flatten(1).double().cpu()
        curvature += J @ J.T
        slope += J @ (batch.fine - states[-1].x).flatten().double().cpu()
    return curvature, slope


def _derivatives(plan: Plan, batch: Batch, states: list[State], advance: Advance) -> list[Tensor]:
    """Of the result, by each inner time and then by each weight, step after step."""
    end, found = states[-1].x, []

    def by(change: float, changed: Plan, first: int, start: State) -> Tensor:
        advance(
            len(end) * sum(not c.refiner for c in changed.calls) * (len(plan) - first) / len(plan)
        )
        return (_states(changed, batch, first, start)[-1].x - end) / change

    for i in range(1, len(plan)):
        ahead = plan.grid[i + 1] - plan.grid[i]
        change = min(_TIME, ahead / 2)
        grid = (*plan.grid[:i], plan.grid[i] + change, *plan.grid[i + 1 :])
        changed = Plan(plan.letters, grid, plan.guidance_interval, weights=plan.weights)
        # Steps without weights also end at that time.
        first = i if plan.weights and plan.letters[i - 1] in FITTED else i - 1
        found.append(by(change, changed, first, states[first]))
    fitted = (
        [i for i, letter in enumerate(plan.letters) if letter in FITTED] if plan.weights else []
    )
    for i, row in zip(fitted, plan.weights, strict=False):
        after = states[i + 1]
        for k in range(len(row)):
            v = after.past[-1 - k].v[: len(end)]
            if i + 1 == len(plan):
                found.append(v)
            else:
                found.append(by(_WEIGHT, plan, i + 1, after._replace(x=after.x + _WEIGHT * v)))
    return found


def _moved(plan: Plan, change: Tensor) -> Plan | None:
    """The plan with its times and weights changed; None where times would not rise, or calls get
    guidance or lose it.
    """
    values = change.tolist()
    times = [t + values.pop(0) for t in plan.grid[1:-1]]
    weights = tuple(tuple(w + values.pop(0) for w in row) for row in plan.weights)
    grid = (plan.grid[0], *times, plan.grid[-1])
    if not all(t0 < t1 for t0, t1 in itertools.pairwise(grid)) or not all(
        math.isfinite(v) for v in change.tolist()
    ):
        return None
    moved = Plan(plan.letters, grid, plan.guidance_interval, weights=weights)
    return moved if moved.cost == plan.cost else None
