"""The search for plans: which sequences and grids are tried, and how the fitted ones grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ..solver.plan import Plan, shifted_grid
from ..solver.steps import MAX_PAST
from .cost import CostModel
from .fit import Advance, Batch, fit_weights, inserted, rms_error, weighted


def grids(steps: int) -> list[tuple[float, ...]]:
    """Uniform; shifted; with steps that grow or shrink along a power or a cosine."""
    uniform = shifted_grid(steps)
    family = [shifted_grid(steps, shift) for shift in (1.0, 0.5, 0.7, 1.4, 2.0)]
    family += [tuple(t**power for t in uniform) for power in (0.8, 1.25)]
    family.append((0.0, *((1 - math.cos(math.pi * t)) / 2 for t in uniform[1:-1]), 1.0))
    return list(dict.fromkeys(family))


REFINED = 3
"""R or S steps at the end of a sequence, at most."""


def sequences(refiner: bool) -> Iterator[str]:
    """Letters of plans of 1, 2, ... predictor steps, and of those joined with refiner steps at the
    end or in between.
    """
    for n in range(1, MAX_PAST + 2):
        heads = ["E" * n, *("H" * h + "P" * (n - h) for h in range(1, n + 1))]
        heads += [letter * n for least, letter in ((2, "A"), (3, "B"), (4, "C")) if n >= least]
        heads += ["H" + letter * (n - 1) for letter in "AB" if n >= 2]
        yield from heads
        if refiner:
            yield from (
                head + tail * r for head in heads for tail in "RS" for r in range(1, REFINED + 1)
            )
            yield from ((letter + "S") * n for letter in "EAB" if n >= 2)


def affordable(
    cost_model: CostModel, refiner: bool, intervals: Sequence[tuple[float, float]]
) -> list[Plan]:
    """Every sequence on the uniform grid that the price allows."""
    found = []
    for letters in sequences(refiner):
        for interval in intervals:
            plan = Plan(letters, shifted_grid(len(letters)), interval)
            if cost_model.allows(plan):
                found.append(plan)
    return found


def searched(
    cost_model: CostModel,
    batches: Sequence[Batch],
    refiner: bool,
    intervals: Sequence[tuple[float, float]],
    unit: float,
    advance: Advance,
) -> list[Plan]:
    """The best plans without weights, one for each whole `unit` of the price, by successive
    halving.

    All sequences on the uniform grid on the first batch; of each price the best tenth on all grids;
    of those the best four on all batches.
    """
    first = batches[:1]
    kept = _best(
        affordable(cost_model, refiner, intervals),
        cost_model,
        unit,
        first,
        advance,
        lambda count: max(3, count // 10),
    )
    on_grids = [
        Plan(plan.letters, grid, plan.guidance_interval)
        for plan in kept
        for grid in grids(len(plan))
    ]
    kept = _best(on_grids, cost_model, unit, first, advance, lambda count: 4)
    return _best(kept, cost_model, unit, batches, advance, lambda count: 1)


def _best(
    plans: Sequence[Plan],
    cost_model: CostModel,
    unit: float,
    batches: Sequence[Batch],
    advance: Advance,
    most: Callable[[int], int],
) -> list[Plan]:
    """Of the plans of each whole unit of the price, the `most` with the least error, the best
    first.
    """
    groups: dict[int, list[tuple[float, int, Plan]]] = {}
    for number, plan in enumerate(plans):
        level = math.ceil((cost_model.of(plan) - cost_model.fixed) / unit - 1e-6)
        groups.setdefault(level, []).append((rms_error(plan, batches, advance), number, plan))
    return [
        plan
        for level in sorted(groups)
        for *_, plan in sorted(groups[level])[: most(len(groups[level]))]
    ]


def fitted(plan: Plan, batches: Sequence[Batch], iterations: int, advance: Advance) -> Plan:
    """Fitted to the first batch, which is cheap, and then to all."""
    if len(batches) > 1:
        plan = fit_weights(plan, batches[:1], iterations=iterations, advance=advance)
    return fit_weights(plan, batches, iterations=iterations, advance=advance)


def multistep(
    n: int,
    shorter: Plan | None,
    batches: Sequence[Batch],
    iterations: int,
    interval: tuple[float, float],
    advance: Advance,
) -> Plan:
    """The best fitted plan of n L steps that is found from Adams-Bashforth on the best grid, and
    from the plan of n - 1 steps.
    """
    first = batches[:1]
    starts = [
        weighted(Plan("L" * n, grid, interval), order)
        for grid in grids(n)
        for order in range(1, min(n, 3) + 1)
    ]
    starts = sorted(starts, key=lambda plan: rms_error(plan, first, advance))[:1]
    if shorter is not None:
        gaps = [b - a for a, b in zip(shorter.grid, shorter.grid[1:], strict=False)]
        starts.append(inserted(shorter, 1 + gaps.index(max(gaps)), "L"))
    begun = [fit_weights(plan, first, iterations=3, advance=advance) for plan in starts]
    return fitted(
        min(begun, key=lambda plan: rms_error(plan, first, advance)), batches, iterations, advance
    )


def with_refiner_step(
    plan: Plan, batches: Sequence[Batch], iterations: int, advance: Advance
) -> Plan:
    """The fitted plan with an M step where it helps most after two iterations, fitted."""
    first = batches[:1]
    tried = [
        fit_weights(inserted(plan, at, "M"), first, iterations=2, advance=advance)
        for at in range(1, len(plan) + 1)
    ]
    found = fitted(
        min(tried, key=lambda plan: rms_error(plan, first, advance)), batches, iterations, advance
    )
    # What helps the first batch alone is not taken: without weight the new step changes nothing.
    return min(
        found, inserted(plan, len(plan), "M"), key=lambda plan: rms_error(plan, batches, advance)
    )
