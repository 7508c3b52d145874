"""Plans that a model's file holds by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..solver.plan import Plan, as_plan
from ..solver.plan_text import expand, has_stages
from ..solver.stages import StagedPlan, as_stages, plan_of
from .class_names import unusable

DEFAULT = "default"
"""The name of the plan that commands take if none is asked for."""
Plans = Mapping[str, Plan | StagedPlan]


def checked_plans(plans: Any) -> dict[str, Plan | StagedPlan]:
    """The plans that a model's file holds, by name.

    plans: name -> what a plan's file holds. Raises TypeError or ValueError for anything else, and
    for a name that would be read as a plan's letters, stages or file.
    """
    if not isinstance(plans, Mapping):
        raise TypeError(f"plans must be a mapping of names to plans, got {plans!r:.80}")
    checked = {}
    for name, contents in plans.items():
        if not isinstance(name, str) or (unusable(name) or "=" in name):
            raise ValueError(
                "plans must have names of one line without '=' and spaces at their ends, got "
                f"{name!r:.80}"
            )
        if _reads_as_plan(name):
            raise ValueError(
                f"plans must have names that are no plans themselves, got {name!r:.80}"
            )
        try:
            checked[name] = plan_of(contents)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"plans: {name!r} is no plan: {error}") from None
    return checked


def _reads_as_plan(name: str) -> bool:
    if name.endswith(".json") or has_stages(name):
        return True
    try:
        return bool(expand(name))
    except ValueError:
        return False


def find_plan(plan: str | Plan | StagedPlan, plans: Plans, shift: float = 1.0) -> Plan | StagedPlan:
    """The plan of this name, or what `as_stages` makes of it.

    plans: those of the model's file. ValueError for a text that is neither names them.
    """
    if isinstance(plan, str) and plan in plans:
        return as_stages(plans[plan], shift)
    try:
        return as_stages(plan, shift)
    except ValueError as error:
        if not plans or not isinstance(plan, str) or _reads_as_plan(plan):
            raise
        raise ValueError(f"{error}\nThe model has plans of its own: {described(plans)}") from None


def find_unstaged(plan: str | Plan | StagedPlan, plans: Plans, shift: float = 1.0) -> Plan:
    """As `find_plan`; ValueError also for a plan with stages."""
    found: Any = find_plan(plan, plans, shift)
    return as_plan(found)


def described(plans: Plans) -> str:
    """The names with the plans and their calls: "fast (A4, 4 calls), ..."."""
    return ", ".join(f"{name} ({plan}, {calls(plan)})" for name, plan in plans.items())


def calls(plan: Plan | StagedPlan) -> str:
    """How many a plan makes, of the refiner apart: "3 calls", "1 predictor and 4 refiner calls"."""
    cost = plan.cost
    if cost.refiner:
        return f"{cost.predictor} predictor and {cost.refiner} refiner calls"
    return f"{cost.predictor} call{'s' * (cost.predictor != 1)}"
