"""The cost of plans, in predictor calls (NFE) or in milliseconds as measured on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..models.flow_model import FlowModel
from ..runtime.device import seconds
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..solver.stages import StagedPlan

TURNS = 9
"""Timed runs per plan."""


class CostModel(NamedTuple):
    """The cost of plans, and a budget, both in predictor calls or in milliseconds per image.

    steps: the cost of a guided step of each kind.
    fixed: the cost that any plan has besides its steps.
    share: the cost of an unguided call as a share of a guided one.
    """

    steps: Mapping[str, float]
    budget: float
    fixed: float = 0.0
    share: float = 0.5

    def of(self, plan: Plan | StagedPlan) -> float:
        """The cost of a plan, with the discount for calls outside its guidance interval.

        A step of a stage costs its share of the finished image's tokens.
        """
        if isinstance(plan, StagedPlan):
            return self.fixed + sum(
                float(stage.size) ** 2 * (self.of(part) - self.fixed)
                for stage, part in zip(plan.stages, plan.plans, strict=True)
            )
        cost = plan.cost
        calls, guided = cost.predictor + cost.refiner, cost.guided_predictor + cost.guided_refiner
        discount = 1 - (1 - self.share) * (calls - guided) / calls
        # A P step that comes first has no cached velocity and makes a second call, and an X step
        # that ends at t = 1 makes one call.
        letters = plan.letters
        if plan.end == 1:
            letters = letters[:-1] + letters[-1].replace("X", "E")
        extra = self.steps["E"] if letters[0] == "P" else 0.0
        steps = sum(self.steps[letter] for letter in letters) + extra
        return self.fixed + discount * steps

    def allows(self, plan: Plan | StagedPlan) -> bool:
        """Whether a plan is within the budget, up to rounding."""
        return self.of(plan) <= self.budget + 1e-9


def call_costs(model: FlowModel) -> dict[str, float]:
    """The cost of each kind of step in predictor calls (NFE).

    A refiner call counts as its share of a predictor call's multiply-accumulates.
    """
    share = model.macs[1] / model.macs[0] if model.macs else 0.0
    return {
        **dict.fromkeys("EABCUDLP", 1.0),
        **dict.fromkeys("HX", 2.0),
        "R": 2 * share,
        **dict.fromkeys("SM", share),
    }


def milliseconds(
    model: FlowModel,
    plans: Sequence[Plan],
    guidance: float,
    batch_size: int,
    turns: int = TURNS,
    advance: Callable[[int], object] = lambda calls: None,
) -> list[float]:
    """Milliseconds per image of each plan, as `sample` computes a batch.

    The plans take turns, and the fastest run of each counts: shared machines slow down by about a
    third for many seconds at a time, which a median may or may not contain.
    advance: gets the number of predictor calls, in images, after each run.
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
        if limit:  # with fewer captures than plans, each timed run would contain a new capture
            model.captures.limit = max(limit, len(plans))
        for plan in plans:
            run(plan)
            run(plan)  # the second run of a kind is captured, where that is possible
        for _ in range(turns):
            for plan, plan_times in zip(plans, times, strict=True):
                plan_times.append(run(plan))
    finally:
        model.captures.limit = limit
    return [min(plan_times) for plan_times in times]


def step_costs(
    model: FlowModel, guidance: float, batch_size: int, refiner: bool
) -> dict[str, float]:
    """Milliseconds per image of each kind of step; "fixed" is the cost of a plan besides its steps.

    refiner: whether to time steps that need it. The cost of a step is the slope between plans with
    one and with three of it.
    """
    few, more = 1, 3
    refined = "RSM" if refiner else ""
    plans = {
        "E": "E",
        **{letter: "H" if letter == "H" else "H1" + letter for letter in "HPABCUDXL" + refined},
    }
    runs = [(letter, count) for letter in plans for count in (few, more)]
    times = milliseconds(
        model,
        [Plan.parse(f"{plans[letter]}{count}") for letter, count in runs],
        guidance,
        batch_size,
    )
    by_run = dict(zip(runs, times, strict=True))
    costs = {
        letter: max(0.0, (by_run[letter, more] - by_run[letter, few]) / (more - few))
        for letter in plans
    }
    return {**costs, "fixed": max(0.0, by_run["E", few] - costs["E"])}
