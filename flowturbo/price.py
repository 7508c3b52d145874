"""What plans cost: in predictor calls, or in milliseconds as measured on this device."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .latency import seconds
from .models import FlowModel
from .plan import Plan
from .sampler import sample


class Price(NamedTuple):
    """What calls cost, in calls or milliseconds, and what they may cost together.

    fixed: of any plan; steps: of each kind of step, with guidance; share: of a step's price that a call without guidance costs.
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


def call_prices(model: FlowModel) -> dict[str, float]:
    """Of each kind of step in predictor calls: a refiner call counts by its share of multiply-accumulates."""
    share = model.macs[1] / model.macs[0] if model.macs else 0.0
    return {**dict.fromkeys("EABCLP", 1.0), "H": 2.0, "R": 2 * share, "S": share, "M": share}


def step_costs(model: FlowModel, guidance: float, batch_size: int, refiner: bool) -> dict[str, float]:
    """Milliseconds an image of each kind of step, and "fixed", of a plan without its steps: medians of runs that take turns."""
    labels = [i % model.num_classes for i in range(batch_size)]
    few, more = 1, 3
    refined = "RSM" if refiner else ""
    plans = {"E": "E", **{letter: "H" if letter == "H" else "H1" + letter for letter in "HPABCL" + refined}}
    runs = {}
    for letter, text in plans.items():
        for count in (few, more):
            plan = Plan.parse(f"{text}{count}")

            def run(plan: Plan = plan) -> Tensor:
                return sample(model, plan, labels, guidance=guidance, seed=0, batch_size=batch_size)

            runs[letter, count] = run
            run()
            run()  # the second of a kind is captured where that is possible
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(3):
        for key, run in runs.items():
            times[key].append(1e3 * seconds(run, model.device) / batch_size)
    median = {key: statistics.median(values) for key, values in times.items()}
    costs = {letter: max(0.0, (median[letter, more] - median[letter, few]) / (more - few)) for letter in plans}
    return {**costs, "fixed": max(0.0, median["E", few] - costs["E"])}
