"""What a pipeline's class becomes while it is accelerated.

It asks for as many steps as the plan has predictor calls, whatever num_inference_steps says.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from typing import Any

from torch import nn

from .masked_class import masked_class

MARK = "_flowturbo"
"""The attribute of an accelerated pipeline that holds what was done to it."""
_COUNT = "num_inference_steps"


class PlannedPipeline:
    """Stands before the pipeline's own class.

    Pipelines count in requested steps: windows of guidance, shares of image-to-image, shifts of
    their noise levels. All of them get the plan's number.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        call: Any = super().__call__  # type: ignore[misc]
        scheduler = vars(self)[MARK].scheduler
        if vars(self).get("scheduler", scheduler) is not scheduler:
            return call(*args, **options)  # the user has put another in its place
        names, steps = list(inspect.signature(call).parameters), scheduler.calls
        place = names.index(_COUNT) if _COUNT in names else len(args)
        if place < len(args):
            args = (*args[:place], steps, *args[place + 1 :])
        elif counts_steps(self):
            options = {**options, _COUNT: steps}
        try:
            return call(*args, **options)
        finally:
            scheduler.abandon()

    @property
    def components(self) -> dict[str, Any]:
        """As for the stock pipeline, so that one made of them (from_pipe) is a stock one."""
        parts: dict[str, Any] = super().components  # type: ignore[misc]
        if sys._getframe(1).f_code.co_name == "from_pipe":
            warnings.warn(
                "a pipeline made from one that is accelerated is a stock one: accelerate it too",
                stacklevel=3,
            )
        return {name: _stock_part(part) for name, part in parts.items()}

    def __copy__(self) -> Any:
        """A stock pipeline with the same parts: two can't share what was done to one."""
        stock = type(self)._masked  # type: ignore[attr-defined]
        made = stock.__new__(stock)
        values = {name: _stock_part(part) for name, part in vars(self).items()}
        made.__dict__.update({name: part for name, part in values.items() if name != MARK})
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Networks first: a scheduler's copy has a refiner of its own only if its network is copied.
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                copy.deepcopy(part, memo)
        kind = type(self)
        memo[id(self)] = made = kind.__new__(kind)
        made.__dict__.update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (type(self)._masked, dict(vars(self)))  # type: ignore[attr-defined]


def _stock_part(part: Any) -> Any:
    """A part of a pipeline, or the scheduler that it takes the place of."""
    from .plan_steps import PlanSteps

    return part.stock if isinstance(part, PlanSteps) else part


def counts_steps(pipe: Any) -> bool:
    """Whether a pipeline takes num_inference_steps, as an argument or as an input of its blocks."""
    blocks = vars(pipe).get("_blocks")
    names = inspect.signature(type(pipe).__call__).parameters
    return _COUNT in names or _COUNT in getattr(blocks, "input_names", ())


def planned_class(stock: Any) -> Any:
    """The class of an accelerated pipeline, under the name of its own."""
    return masked_class(PlannedPipeline, stock, ("__call__",))


def _revive(stock: type[Any], values: dict[str, Any]) -> Any:
    kind = planned_class(stock)
    pipe = kind.__new__(kind)
    pipe.__dict__.update(values)
    return pipe
