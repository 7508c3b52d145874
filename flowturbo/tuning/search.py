"""The search for plans: candidate sequences and time grids, and how fitted plans grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ..solver.plan import Plan, shifted_grid
from ..solver.steps import EXPONENTIAL, MAX_PAST
from .cost import CostModel
from .fit import Advance, Batch, fit_weights, inserted, rms_error, weighted


def grids(steps: int) -> list[tuple[float, ...]]:
    """Candidate time grids of so many steps: uniform, shifted, powers of t, and a cosine."""
    uniform = shifted_grid(steps)
    candidates = [shifted_grid(steps, shift) for shift in (1.0, 0.5, 0.7, 1.4, 2.0)]
    candidates += [tuple(t**power for t in uniform) for power in (0.8, 1.25)]
    candidates.append((0.0, *((1 - math.cos(math.pi * t)) / 2 for t in uniform[1:-1]), 1.0))
    return list(dict.fromkeys(candidates))


MAX_REFINER_STEPS = 3
"""Most R or S steps at the end of a sequence."""


def sequences(refiner: bool) -> Iterator[str]:
    """Sequences of 1, 2, ... predictor steps, with refiner steps at the end or in between."""
    for n in range(1, MAX_PAST + 2):
        heads = ["E" * n, *("H" * h + "P" * (n - h) for h in range(1, n + 1))]
        heads += [letter * n for least, letter in ((2, "A"), (3, "B"), (4, "C")) if n >= least]
        heads += [letter * n for letter in EXPONENTIAL if n >= 2]
        heads += [first + letter * (n - 1) for first, letter in ("HA", "HB", "XA") if n >= 2]
        # The last U step is Euler's; Adams-Bashforth is better there.
        heads += ["U" * (n - len(end)) + end for end in ("A", "AA", "BB") if n >= len(end) + 2]
        yield from heads
        if refiner:
            yield from (
                head + tail * r
                for head in heads
                for tail in "RS"
                for r in range(1, MAX_REFINER_STEPS + 1)
            )
            yield from ((letter + "S") * n for letter in "EAB" if n >= 2)


def affordable(
    cost_model: CostModel, refiner: bool, intervals: Sequence[tuple[float, float]]
) -> list[Plan]:
    """Every sequence within the budget, on the uniform grid, with each guidance interval."""
    plans = (
        Plan(letters, shifted_grid(len(letters)), interval)
        for letters in sequences(refiner)
        for interval in intervals
    )
    return [plan for plan in plans if cost_model.allows(plan)]


def published(cost_model: CostModel, refiner: bool) -> list[Plan]:
    """Plans as published, on the uniform grid: of each scheme all within the budget."""
    sequences = [letter * n for n in range(1, MAX_PAST + 2) for letter in "EABCHUDX"]
    sequences += ["H" + "P" * n for n in range(1, MAX_PAST + 1)]
    if refiner:
        sequences += ["H" + "P" * p + "R" * r for p in range(6) for r in range(1, 4)]
    plans = [Plan(letters, shifted_grid(len(letters))) for letters in dict.fromkeys(sequences)]
    # Of an order k, fewer than k steps are those of a lower one; the last of U, D and X is Euler's.
    least = {"A": 2, "B": 3, "C": 4, "U": 3, "D": 3, "X": 2}
    return [
        plan
        for plan in plans
        if cost_model.allows(plan) and len(plan) >= least.get(plan.letters[0], 1)
    ]


def searched(
    cost_model: CostModel,
    batches: Sequence[Batch],
    refiner: bool,
    intervals: Sequence[tuple[float, float]],
    unit: float,
    advance: Advance,
) -> list[Plan]:
    """The best plans without weights, one for each whole `unit` of cost, by successive halving.

    First all sequences are compared on the uniform grid and the first batch; then, of each cost,
    the best tenth on all grids; then the best four of these on all batches.
    """
    first = batches[:1]
    survivors = _best(
        affordable(cost_model, refiner, intervals),
        cost_model,
        unit,
        first,
        advance,
        lambda count: max(3, count // 10),
    )
    on_grids = [
        Plan(plan.letters, grid, plan.guidance_interval)
        for plan in survivors
        for grid in grids(len(plan))
    ]
    survivors = _best(on_grids, cost_model, unit, first, advance, lambda count: 4)
    return _best(survivors, cost_model, unit, batches, advance, lambda count: 1)


def _best(
    plans: Sequence[Plan],
    cost_model: CostModel,
    unit: float,
    batches: Sequence[Batch],
    advance: Advance,
    limit: Callable[[int], int],
) -> list[Plan]:
    """For each whole unit of cost, the plans with the least error, the best first.

    limit: number of plans at a cost -> how many of them to return.
    """
    groups: dict[int, list[tuple[float, int, Plan]]] = {}
    for number, plan in enumerate(plans):
        level = math.ceil((cost_model.of(plan) - cost_model.fixed) / unit - 1e-6)
        groups.setdefault(level, []).append((rms_error(plan, batches, advance), number, plan))
    return [
        plan
        for level in sorted(groups)
        for *_, plan in sorted(groups[level])[: limit(len(groups[level]))]
    ]


def fitted(plan: Plan, batches: Sequence[Batch], iterations: int, advance: Advance) -> Plan:
    """The plan fitted to the first batch, which is cheap, and then to all batches."""
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
    """The best fitted plan of n L steps.

    Fits start from Adams-Bashforth on the best grid, and from `shorter`, the plan of n - 1 steps.
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
    candidates = [fit_weights(plan, first, iterations=3, advance=advance) for plan in starts]
    best = min(candidates, key=lambda plan: rms_error(plan, first, advance))
    return fitted(best, batches, iterations, advance)


def with_refiner_step(
    plan: Plan, batches: Sequence[Batch], iterations: int, advance: Advance
) -> Plan:
    """The fitted plan with one more M step, at the place where it helps most, fitted again."""
    first = batches[:1]
    candidates = [
        fit_weights(inserted(plan, at, "M"), first, iterations=2, advance=advance)
        for at in range(1, len(plan) + 1)
    ]
    best = min(candidates, key=lambda plan: rms_error(plan, first, advance))
    refined = fitted(best, batches, iterations, advance)
    # A step that helps on the first batch alone must not hurt: with zero weights it has no effect.
    unchanged = inserted(plan, len(plan), "M")
    return min(refined, unchanged, key=lambda plan: rms_error(plan, batches, advance))
