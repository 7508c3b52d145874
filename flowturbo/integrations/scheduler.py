"""A plan as a diffusers scheduler: one "timestep" is one predictor call.

So any flow-matching pipeline can run the steps of a plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from ..solver.plan import Plan, as_plan
from .accepted import base_of, check_configuration
from .masked_class import dressed
from .plan_steps import DRESSED, Grid, PlanSteps, revive

__all__ = ["Grid", "PlanScheduler", "PlanSteps"]


class PlanScheduler(PlanSteps, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """FlowMatchEulerDiscreteScheduler with the predictor calls of a plan as its timesteps.

    plan: a Plan, or text such as "H1P5". plan_grid: the grid of a plan given as text.
    grid: "pipeline": the noise levels that the pipeline would use for as many Euler steps as the
        plan has steps, with its shift; "corrected": the same, but with the shift applied once,
        where pipelines that give no sigmas apply it twice (diffusers' issue 13243); "plan": the
        plan's own grid; "auto": the plan's if it is not uniform, else the pipeline's.
    stock: the configuration of the scheduler that it replaces.
    Raises ValueError for plans and configurations that a pipeline can't run.
    """

    def __init__(
        self,
        plan: str | Plan = "A7",
        grid: Grid = "auto",
        plan_grid: Sequence[float] | None = None,
        **stock: Any,
    ) -> None:
        super().__init__(**stock)
        check_configuration(self, FlowMatchEulerDiscreteScheduler)
        self._adopt_plan(
            as_plan(plan) if plan_grid is None else Plan.parse(str(plan), grid=plan_grid), grid
        )
        self.register_to_config(_plan=self.plan.record(), _grid=grid)

    @classmethod
    def of(cls, scheduler: Any, plan: str | Plan, grid: Grid = "auto") -> Any:
        """A scheduler with a plan, of the class of a stock scheduler, and all that was set on it.

        Its configuration is the stock scheduler's, with the plan under names that stock schedulers
        pass over.
        Raises TypeError or ValueError for a scheduler that no plan can take the place of.
        """
        base_of(scheduler)
        planned = revive(type(scheduler), dict(vars(scheduler)))
        planned.stock = scheduler
        planned._adopt_plan(as_plan(plan), grid)
        planned.register_to_config(_plan=planned.plan.record(), _grid=grid)
        return planned

    @classmethod
    def from_config(cls, config: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """A scheduler of a configuration that one with a plan has saved."""
        made: Any = super().from_config(config, **options)
        scheduler = made[0] if isinstance(made, tuple) else made
        record = dict(config or {}).get("_plan")
        if record is not None and "plan" not in options:
            scheduler._adopt_plan(Plan.from_record(record), dict(config)["_grid"])
            scheduler.register_to_config(_plan=record, _grid=dict(config)["_grid"])
        return made


for _name in DRESSED:
    _method = dressed(getattr(PlanSteps, _name), getattr(FlowMatchEulerDiscreteScheduler, _name))
    setattr(PlanScheduler, _name, _method)

# diffusers reads from the signature which entries of a saved configuration are arguments.
_OURS, _STOCK = (
    inspect.signature(kind.__init__).parameters
    for kind in (PlanScheduler, FlowMatchEulerDiscreteScheduler)
)
PlanScheduler.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(p for p in _OURS.values() if p.kind is not p.VAR_KEYWORD),
        *(p for name, p in _STOCK.items() if name != "self"),
    ]
)
