"""Fitting a plan's times, and the weights of its L and M steps, to the fine solution.

Every published solver with one call per step calls the model at the noise plus weighted velocities
of earlier calls. This holds for Adams-Bashforth, UniPC and DPM-Solver++, and for Heun's method as
two such steps. Their weights come from a Taylor series; here they are fitted to the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solver.plan import Plan
from ..solver.steps import FITTED, MAX_PAST, Field, State, adams_bashforth_weights


class Batch(NamedTuple):
    """Images to fit to.

    field: plan -> the velocity field that its steps call, for these images.
    noise (N, ...), and fine (N, ...), the fine solution from that noise.
    rows: indices -> the batch of these images alone; None where there is no such choice.
    """

    field: Callable[[Plan], Field]
    noise: Tensor
    fine: Tensor
    rows: Callable[[Tensor], Batch] | None = None


Advance = Callable[[float], object]
"""Progress: gets the number of predictor calls times images since the last report."""
Keeping = Callable[[str, Callable[[], Any]], Any]
"""(name, make) -> what `make` returned, perhaps in an earlier run; see `storage.resume.Keep`."""


def _anew(name: str, make: Callable[[], Any]) -> Any:
    return make()


def weighted(plan: Plan, order: int) -> Plan:
    """A plan of L and M steps with weights for every velocity: Adams-Bashforth's, and zeros.

    order: of Adams-Bashforth. ValueError for other steps, and for a plan longer than MAX_PAST + 1.
    """
    if set(plan.letters) - set(FITTED):
        raise ValueError(f"plan must be of {' and '.join(FITTED)} steps alone, got {plan}")
    if len(plan) > MAX_PAST + 1:
        raise ValueError(
            f"plan must have at most {MAX_PAST + 1} steps, so that each can use every earlier "
            f"velocity, got {len(plan)}"
        )
    rows = []
    for i, (t0, t1) in enumerate(itertools.pairwise(plan.grid)):
        newest = adams_bashforth_weights(list(plan.grid[max(0, i + 1 - order) : i + 1]), t0, t1)[
            ::-1
        ]
        rows.append((*newest, *(0.0,) * (i + 1 - len(newest))))
    return Plan(plan.letters, plan.grid, plan.guidance_interval, weights=tuple(rows))


def inserted(plan: Plan, at: int, letter: str) -> Plan:
    """The weighted plan with one more call before step `at`, halfway between the two times.

    at: from 1 to len(plan), where the last means after the last step. All weights of the new step
    and of its velocity are zero, so until it is fitted the plan computes the same result.
    """
    time = (
        (plan.grid[at - 1] + plan.grid[at]) / 2 if at < len(plan) else (plan.grid[at - 1] + 1) / 2
    )
    rows = []
    for i, row in enumerate(plan.weights):
        if i == at:
            rows.append((0.0,) * (at + 1))
        # Newest first: of step i's velocities, the first i + 1 - at are of step `at` or later.
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
    """The root mean square of (result - fine solution) over all values of all batches.

    Infinity where a result is NaN or infinite.
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
    keep: Keeping = _anew,
    name: str = "fit",
) -> Plan:
    """A plan of the same letters and cost whose error on these batches is at most that of `plan`.

    It fits the inner times, whose order is kept, and the weights that `plan` has, by damped
    Gauss-Newton (Levenberg-Marquardt). Derivatives are finite differences, so any velocity field
    will do and no gradient of the model is needed.

    iterations: at most so many. least_gain: the fit ends when an iteration lowers the error by less
    than this share.
    """
    error = keep(f"{name}, start", lambda: rms_error(plan, batches, advance))
    damping = 1e-4
    for number in range(iterations):
        now = plan, error, damping

        def iteration(now: tuple[Plan, float, float] = now) -> list[Any]:
            plan, *rest = _iteration(*now, batches, advance)
            return [plan.record(), *rest]

        before = error
        record, error, damping = keep(f"{name}, iteration {number}", iteration)
        plan = Plan.from_record(record)
        if before - error <= least_gain * before:
            break
    return plan


def _iteration(
    plan: Plan, error: float, damping: float, batches: Sequence[Batch], advance: Advance
) -> tuple[Plan, float, float]:
    """A plan that errs less, its error and the next damping; the plan itself if none is found."""
    curvature, slope = _normal_equations(plan, batches, advance)
    scale = curvature.diagonal().clamp(min=1e-8 * float(curvature.diagonal().max()))
    for _ in range(8):
        candidate = _moved(plan, torch.linalg.solve(curvature + damping * scale.diag(), slope))
        lowered = math.inf if candidate is None else rms_error(candidate, batches, advance)
        if candidate is not None and lowered < error:
            return candidate, lowered, max(damping / 10, 1e-9)
        damping = max(10 * damping, 1e-4)
    return plan, error, damping


_TIME, _WEIGHT = 2e-3, 2e-3
"""Finite differences of a time and of a weight. In float32 a derivative's rounding error is then
about 1e-3, like its truncation error.
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
    """J'J and J'r in float64: J is the Jacobian of the result, r = fine solution - result.

    The parameters are those of `_derivatives`, in its order.
    """
    count = len(plan) - 1 + sum(map(len, plan.weights))
    curvature, slope = (
        torch.zeros(count, count, dtype=torch.float64, device="cpu"),
        torch.zeros(count, dtype=torch.float64, device="cpu"),
    )
    for batch in batches:
        states = _states(plan, batch)
        J = torch.stack(_derivatives(plan, batch, states, advance)).flatten(1).double().cpu()
        curvature += J @ J.T
        slope += J @ (batch.fine - states[-1].x).flatten().double().cpu()
    return curvature, slope


def _derivatives(
    plan: Plan,
    batch: Batch,
    states: list[State],
    advance: Advance,
    wanted: Callable[[int, int | None], bool] = lambda step, k: True,
) -> list[Tensor]:
    """The derivatives of the result by each inner time, then by each weight, in order of steps.

    wanted: (step, number of its weight) -> whether to compute it; the number is None for the time
        at which a step starts.
    """
    end, derivatives = states[-1].x, []

    def difference(change: float, changed: Plan, first: int, start: State) -> Tensor:
        advance(
            len(end) * sum(not c.refiner for c in changed.calls) * (len(plan) - first) / len(plan)
        )
        return (_states(changed, batch, first, start)[-1].x - end) / change

    for i in filter(lambda i: wanted(i, None), range(1, len(plan))):
        change = min(_TIME, (plan.grid[i + 1] - plan.grid[i]) / 2)
        grid = (*plan.grid[:i], plan.grid[i] + change, *plan.grid[i + 1 :])
        changed = Plan(plan.letters, grid, plan.guidance_interval, weights=plan.weights)
        # A step without weights also depends on the time at which it ends.
        first = i if plan.weights and plan.letters[i - 1] in FITTED else i - 1
        derivatives.append(difference(change, changed, first, states[first]))
    fitted = (
        [i for i, letter in enumerate(plan.letters) if letter in FITTED] if plan.weights else []
    )
    for i, row in zip(fitted, plan.weights, strict=False):
        after = states[i + 1]
        for k in filter(lambda k: wanted(i, k), range(len(row))):
            v = after.past[-1 - k].v[: len(end)]
            if i + 1 == len(plan):
                derivatives.append(v)
            else:
                start = after._replace(x=after.x + _WEIGHT * v)
                derivatives.append(difference(_WEIGHT, plan, i + 1, start))
    return derivatives


def _moved(plan: Plan, change: Tensor) -> Plan | None:
    """The plan with its times and weights changed by `change`, in the order of `_derivatives`.

    None where times would not rise, and where a call would enter or leave the guidance interval.
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
