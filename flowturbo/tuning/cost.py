"""What plans cost: in predictor calls, or in milliseconds as measured on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..models.flow_model import FlowModel
from ..runtime.device import seconds
from ..sampling.sampler import sample
from ..solver.plan import Plan

TURNS = 9
"""How often each plan is timed."""


class CostModel(NamedTuple):
    """What calls cost, in calls or milliseconds, and what they may cost together.

    fixed: of any plan; steps: of each kind of step, with guidance; share: of a step's price that a
        call without guidance costs.
    """

    steps: Mapping[str, float]
    budget: float
    fixed: float = 0.0
    share: float = 0.5

    def of(self, plan: Plan) -> float:
        cost = plan.cost
        calls, guided = cost.predictor + cost.refiner, cost.guided_predictor + cost.guided_refiner
        free = 1 - (1 - self.share) * (calls - guided) / calls
        # A first P makes a call more than its price says.
        more = self.steps["E"] if plan.letters[0] == "P" else 0.0
        return self.fixed + free * (sum(self.steps[letter] for letter in plan.letters) + more)

    def allows(self, plan: Plan) -> bool:
        return self.of(plan) <= self.budget + 1e-9


def call_costs(model: FlowModel) -> dict[str, float]:
    """Of each kind of step in predictor calls: a refiner call counts by its share of
    multiply-accumulates.
    """
    share = model.macs[1] / model.macs[0] if model.macs else 0.0
    return {**dict.fromkeys("EABCLP", 1.0), "H": 2.0, "R": 2 * share, "S": share, "M": share}


def milliseconds(
    model: FlowModel,
    plans: Sequence[Plan],
    guidance: float,
    batch_size: int,
    turns: int = TURNS,
    advance: Callable[[int], object] = lambda calls: None,
) -> list[float]:
    """An image of each plan, as `sample` makes a batch: the fastest of runs in which the plans take
    turns.

    Shared machines are slower for many seconds at a time, by a third or so, which the median of a
    plan's runs may or may not show.
    advance: told how many predictor calls were made.
    """
    labels = [i % model.num_classes for i in range(batch_size)]
    times: list[list[float]] = [[] for _ in plans]

    def run(plan: Plan) -> float:
        took = seconds(
            lambda: sample(model, plan, labels, guidance=guidance, seed=0, batch_size=batch_size),
            model.device,
        )
        advance(batch_size * plan.cost.predictor)
        return 1e3 * took / batch_size

    limit = model.captures.limit
    try:
        if limit:
            model.captures.limit = max(
                limit, len(plans)
            )  # or each run would be captured anew, and that be timed
        for plan in plans:
            run(plan)
            run(plan)  # the second of a kind is captured where that is possible
        for _ in range(turns):
            for plan, found in zip(plans, times, strict=True):
                found.append(run(plan))
    finally:
        model.captures.limit = limit
    return [min(found) for found in times]


def step_costs(
    model: FlowModel, guidance: float, batch_size: int, refiner: bool
) -> dict[str, float]:
    """Milliseconds an image of each kind of step, and "fixed", of a plan without its steps."""
    few, more = 1, 3
    refined = "RSM" if refiner else ""
    plans = {
        "E": "E",
        **{letter: "H" if letter == "H" else "H1" + letter for letter in "HPABCL" + refined},
    }
    runs = [(letter, count) for letter in plans for count in (few, more)]
    timed = milliseconds(
        model,
        [Plan.parse(f"{plans[letter]}{count}") for letter, count in runs],
        guidance,
        batch_size,
    )
    took = dict(zip(runs, timed, strict=True))
    costs = {
        letter: max(0.0, (took[letter, more] - took[letter, few]) / (more - few))
        for letter in plans
    }
    return {**costs, "fixed": max(0.0, took["E", few] - costs["E"])}
