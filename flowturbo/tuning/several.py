"""The search for several budgets at once, each near its own cost, with as few network calls as the
comparison needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..evaluation.statistics import family
from ..solver.plan import Plan, shifted_grid
from ..solver.steps import MAX_PAST
from . import search
from .cost import CostModel
from .fit import Advance, Batch, Keeping, fit_weights, inserted, rms_error, weighted
from .foreseen import foreseen_errors

SCREENED = 17
"""Images that sequences and grids are compared on before the best few are on all."""


class Search:
    """What the searches for all budgets have in common.

    cost_model: in predictor calls; its budget is the largest. unfinished: keeps parts of fits.
    """

    def __init__(
        self,
        cost_model: CostModel,
        batches: Callable[[], list[Batch]],
        refiner_steps: int,
        iterations: int,
        keep: Keeping,
        unfinished: Keeping,
        advance: Advance,
    ) -> None:
        self.cost_model, self.batches, self.refiner_steps = cost_model, batches, refiner_steps
        self.keep, self.unfinished, self.advance = keep, unfinished, advance
        self.iterations = iterations

    @functools.cached_property
    def screen(self) -> list[Batch]:
        """A few images of the first batch, of as many classes as possible."""
        first = self.batches()[0]
        if first.rows is None or len(first.noise) <= SCREENED:
            return [first]
        # Classes follow one another: every third image, so that no style is left out.
        rows = 3 * torch.arange(SCREENED, device="cpu") % len(first.noise)
        return [first.rows(rows.unique())]

    def within(self, plan: Plan, budget: float) -> bool:
        """Whether a plan costs at most the budget, and more than one predictor call less."""
        cost = self.cost_model.of(plan)
        return budget - 1 + 1e-9 < cost <= budget + 1e-9

    def searched(self, budget: float, intervals: Sequence[tuple[float, float]]) -> Plan | None:
        """The best plan without weights near the budget, by successive halving."""
        plans = [
            plan
            for plan in search.affordable(self.cost_model, self.refiner_steps > 0, intervals)
            if self.within(plan, budget)
        ]
        if not plans:
            return None
        name = f"searched {budget:g}"
        plans = self._best(plans, self.screen, max(3, len(plans) // 10), f"{name}, sequences")
        on_grids = [
            Plan(plan.letters, grid, plan.guidance_interval)
            for plan in plans
            for grid in search.grids(len(plan))
        ]
        plans = self._best(on_grids, self.screen, 4, f"{name}, grids")
        return self._best(plans, self.batches(), 1, name)[0]

    def _best(self, plans: list[Plan], batches: list[Batch], count: int, name: str) -> list[Plan]:
        def best() -> list[dict[str, Any]]:
            errors = [rms_error(plan, batches, self.advance) for plan in plans]
            order = sorted(range(len(plans)), key=lambda i: errors[i])
            return [plans[i].record() for i in order[:count]]

        return [Plan.from_record(record) for record in self.unfinished(name, best)]

    def fitted(
        self, budget: float, shorter: Plan | None, interval: tuple[float, float]
    ) -> Iterator[Plan]:
        """Fitted plans near the budget: of L steps alone, then with 1, 2, ... M steps.

        shorter: the plan of L steps of the budget before, which is one of the starts.
        """
        n = max(
            (
                n
                for n in range(1, MAX_PAST + 2)
                if self.cost_model.of(Plan("L" * n, shifted_grid(n), interval)) <= budget + 1e-9
            ),
            default=0,
        )
        if not n or (shorter is not None and len(shorter) >= n):
            return
        start = "" if shorter is None else f" from L{len(shorter)}"
        suffix = start if interval == (0.0, 1.0) else f"{start} in {interval}"

        def kept(name: str, make: Callable[[str], Plan]) -> Plan:
            return Plan.from_record(self.keep(name, lambda: make(name).record()))

        plan = kept(f"L{n}{suffix}", lambda name: self._multistep(n, shorter, interval, name))
        yield plan
        for m in range(1, self.refiner_steps + 1):
            if len(plan) > MAX_PAST or self.cost_model.of(inserted(plan, 1, "M")) > budget + 1e-9:
                return
            plan = kept(f"L{n} with {m}{suffix}", functools.partial(self._refined, plan))
            yield plan

    def _multistep(
        self, n: int, shorter: Plan | None, interval: tuple[float, float], name: str
    ) -> Plan:
        """The best fitted plan of n L steps; see `search.multistep`."""

        def start() -> dict[str, Any]:
            starts = [
                weighted(Plan("L" * n, grid, interval), order)
                for grid in search.grids(n)
                for order in range(1, min(n, 3) + 1)
            ]
            return min(starts, key=lambda plan: rms_error(plan, self.screen, self.advance)).record()

        starts = [Plan.from_record(self.unfinished(f"{name}, start", start))]
        if shorter is not None:
            while len(shorter) < n:
                gaps = [b - a for a, b in zip(shorter.grid, shorter.grid[1:], strict=False)]
                shorter = inserted(shorter, 1 + gaps.index(max(gaps)), "L")
            starts.append(shorter)
        return self._best_fit(starts, name)

    def _refined(self, plan: Plan, name: str) -> Plan:
        """The fitted plan with one more M step, where it helps most, fitted again."""
        places = self.unfinished(
            f"{name}, places",
            lambda: foreseen_errors(plan, self.batches()[0], "M", self.advance),
        )
        order = sorted(range(len(places)), key=lambda i: places[i])[:2]
        refined = self._best_fit([inserted(plan, 1 + i, "M") for i in order], name)
        unchanged = inserted(plan, len(plan), "M")
        return min(
            refined,
            unchanged,
            key=lambda plan: rms_error(plan, self.batches(), self.advance),
        )

    def _best_fit(self, starts: Sequence[Plan], name: str) -> Plan:
        """The best start after two iterations on the first batch, fitted to all batches."""
        batches = self.batches()
        candidates = [
            self._fit(plan, batches[:1], 2, f"{name}, from {number}")
            for number, plan in enumerate(starts)
        ]
        plan = min(candidates, key=lambda plan: rms_error(plan, batches[:1], self.advance))
        return self._fit(plan, batches, self.iterations, f"{name}, all batches")

    def _fit(self, plan: Plan, batches: list[Batch], iterations: int, name: str) -> Plan:
        return fit_weights(
            plan,
            batches,
            iterations=min(iterations, self.iterations),
            advance=self.advance,
            keep=self.unfinished,
            name=name,
        )


def find(
    budgets: Sequence[float], common: Search, intervals: Sequence[tuple[float, float]]
) -> list[tuple[Plan, str]]:
    """Plans near each budget, each with how it was found: "searched" or "fitted"."""
    plans: list[tuple[Plan, str]] = []
    shorter: dict[tuple[float, float], Plan] = {}
    for budget in budgets:

        def searched(budget: float = budget) -> dict[str, Any] | None:
            plan = common.searched(budget, intervals)
            return None if plan is None else plan.record()

        if record := common.keep(f"searched {budget:g}", searched):
            plans.append((Plan.from_record(record), "searched"))
        for interval in intervals:
            fitted = list(common.fitted(budget, shorter.get(interval), interval))
            plans += [(plan, "fitted") for plan in fitted]
            if fitted:
                shorter[interval] = fitted[0]
    return plans


def published(budgets: Sequence[float], cost_model: CostModel, refiner: bool) -> list[Plan]:
    """Of each scheme and order the dearest published plan within each budget.

    With refiner steps all plans that cost more than one predictor call less than the budget.
    """
    chosen: dict[Plan, None] = {}
    for budget in budgets:
        dearest: dict[str, Plan] = {}
        for plan in search.published(cost_model._replace(budget=budget), refiner):
            if plan.cost.refiner:
                if cost_model.of(plan) > budget - 1 + 1e-9:
                    chosen[plan] = None
            else:
                scheme = "HP" if family(plan) == "pseudo corrector" else plan.letters[0]
                if scheme not in dearest or cost_model.of(plan) > cost_model.of(dearest[scheme]):
                    dearest[scheme] = plan
        chosen.update(dict.fromkeys(dearest.values()))
    return list(chosen)
