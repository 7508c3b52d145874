"""accelerate() and restore(): plans inside diffusers pipelines.

With a plan come, if asked for, a refiner, fused kernels and CUDA graphs. Only the objects of this
pipeline are changed, never a class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.flow_model import FlowModel
from ..models.prompt_kind import type_name
from ..models.text_to_image import KINDS, check_refiner
from ..runtime.cuda_graphs import Captures
from ..solver.plan import Plan, as_plan
from .masked_class import stock_class
from .planned_pipeline import MARK, planned_class
from .transformer import (
    AttachedRefiner,
    Graphed,
    Undo,
    counting_cache,
    fuse_adaln,
    networks_of,
)

if TYPE_CHECKING:
    from .scheduler import Grid, PlanSteps


@dataclass
class Accelerated:
    """The changes to a pipeline, and what has run since then.

    swapped: pipeline, attribute and stock scheduler, for all that were replaced.
    undo: functions that undo the other changes, in the order they were made.
    """

    plan: Plan
    scheduler: PlanSteps
    captures: Captures | None = None
    swapped: list[tuple[Any, str, Any]] = field(default_factory=list)
    undo: list[Undo] = field(default_factory=list)


def accelerate(
    pipe: Any,
    plan: str | Plan = "A7",
    refiner: nn.Module | str | os.PathLike[str] | None = None,
    *,
    graph: bool = False,
    grid: Grid = "auto",
) -> Any:
    """Make a diffusers flow-matching pipeline (SD3, FLUX, Qwen-Image, Wan, ...) sample by a plan.

    The pipeline is called as before and makes the predictor calls of the plan; whatever it counts
    in num_inference_steps gets the plan's number of calls, and what the caller says is ignored.
    plan: a Plan, or text such as "H1P4E1".
    refiner: for plans with R or S steps, a network as `refiner_for` makes it, or the folder it was
        saved to. It gets the prompts, guidance and other arguments of the transformer's last call.
    graph: fuse the transformer's adaLN, and on CUDA replay it as a CUDA graph, at most eight, one
        per shape of its inputs. Changes of a LoRA other than of its weights (set_adapters) are not
        noticed: restore, and accelerate again.
    grid: the noise levels; see integrations.scheduler.PlanScheduler.
    LoRAs, ControlNets, callbacks, generators, image-to-image and inpainting work as before. Several
    threads may share the pipeline, with the same guidance and other settings, which diffusers keeps
    on the pipeline. It can be pickled and deep-copied. A pipeline made of its components
    (from_pipe) is a stock one, to be accelerated by itself.
    Returns the pipeline. Raises ValueError if it is accelerated already, if the refiner does not
    fit the plan, or if the plan calls the network at noise level 0, where the pipeline divides by
    the level; TypeError for a pipeline whose scheduler or way of sampling no plan can replace, or
    whose network is unknown.
    """
    if getattr(pipe, "scheduler", None) is None:
        hint = ": load its components first" if hasattr(pipe, "load_components") else ""
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}{hint}"
        )
    from .known_pipelines import check_kind, check_plan
    from .scheduler import PlanScheduler

    if MARK in vars(pipe):
        raise ValueError(
            f"this pipeline is accelerated by plan {_state_of(pipe).plan} already: restore it first"
        )
    plan = as_plan(plan)
    if bool(plan.cost.refiner) != (refiner is not None):
        problem = (
            "has refiner steps: give a refiner"
            if plan.cost.refiner
            else "has no refiner steps, but a refiner was given"
        )
        raise ValueError(f"plan {plan} {problem}")
    check_kind(pipe)
    swapped = _with_stock_schedulers(pipe)
    planned = {
        stock: PlanScheduler.of(stock, plan, grid)
        for stock in {id(stock): stock for _, _, stock in swapped}.values()
    }
    scheduler = next(planned[stock] for part, name, stock in swapped if name == "scheduler")
    check_plan(pipe, scheduler)
    network = getattr(pipe, "transformer", None)
    if (refiner is not None or graph) and type_name(network) not in KINDS:
        raise TypeError(
            f"refiner and graph know the transformers {', '.join(KINDS)}, not {type_name(network)}"
        )
    networks = networks_of(pipe)
    if graph and (cache := next(filter(None, map(counting_cache, networks)), None)):
        raise ValueError(
            f"graph must be False while {cache} is in the {type_name(network)}: it counts calls, "
            "which a captured graph repeats as they were"
        )
    refiner_network = None if refiner is None else check_refiner(refiner, network)

    state = Accelerated(plan, scheduler, swapped=swapped)
    if refiner_network is not None:
        assert network is not None
        scheduler.refiner = AttachedRefiner(pipe, network, refiner_network.eval())
        state.undo.append(scheduler.refiner.remove)
    if graph:
        state.captures = Captures()
        for one in networks:
            state.undo += [*fuse_adaln(one), Graphed(one, state.captures).remove]
    for part, name, stock in swapped:
        _set_scheduler(part, name, planned[stock])
    for part in _with_inner(pipe):
        part.__class__ = planned_class(type(part))
        vars(part)[MARK] = state
    return pipe


def restore(pipe: Any) -> Any:
    """Undo accelerate, to the bit -> the pipeline.

    A scheduler that was put in the place of ours meanwhile stays.
    Raises ValueError if it is not accelerated.
    """
    from .scheduler import PlanSteps

    state = _state_of(pipe)
    for undo in reversed(state.undo):
        undo()
    for part, name, stock in state.swapped:
        part.__class__ = stock_class(type(part))
        if isinstance(getattr(part, name), PlanSteps):
            _set_scheduler(part, name, stock)
        vars(part).pop(MARK, None)
    if state.captures is not None:
        state.captures.clear()
    return pipe


def _with_inner(pipe: Any) -> list[Any]:
    """The pipeline, and those that it consists of (VisualCloze: two)."""
    from diffusers import DiffusionPipeline

    return [pipe, *(part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline))]


def _with_stock_schedulers(pipe: Any) -> list[tuple[Any, str, Any]]:
    """Pipeline, attribute and stock scheduler of all that are to be replaced, the main one first.

    A pipeline may have been made with the scheduler of another that is accelerated.
    """
    from .scheduler import PlanSteps

    return [
        (part, name, scheduler.stock if isinstance(scheduler, PlanSteps) else scheduler)
        for part in _with_inner(pipe)
        for name, scheduler in _schedulers(part)
    ]


def _schedulers(pipe: Any) -> list[tuple[str, Any]]:
    """Attributes and schedulers of a pipeline; LTX-2 may have one for sound beside its own."""
    from diffusers import SchedulerMixin

    parts = {"scheduler": pipe.scheduler, **vars(pipe)}
    return [
        (name, part)
        for name, part in parts.items()
        if name == "scheduler" or isinstance(part, SchedulerMixin)
    ]


def _set_scheduler(pipe: Any, name: str, scheduler: Any) -> None:
    """Put a scheduler in its place, and leave what the pipeline says it consists of.

    A pipeline is saved with the classes of its components, and must load as a stock one.
    """
    config = vars(pipe).get("_internal_dict")
    setattr(pipe, name, scheduler)
    if config is not None:
        object.__setattr__(pipe, "_internal_dict", config)


@contextmanager
def accelerated(pipe: Any, plan: str | Plan, *args: Any, **options: Any) -> Iterator[Any]:
    """Accelerate the pipeline inside a `with` block. Arguments: those of `accelerate`."""
    accelerate(pipe, plan, *args, **options)
    try:
        yield pipe
    finally:
        restore(pipe)


def summary(model: Any) -> str:
    """What is captured and what it costs, as text, and what could not be captured.

    One line per capture: what it runs, milliseconds with and without the graph, memory and replays.
    model: a FlowModel, or a diffusers pipeline that is accelerated, for which plan, calls and
        milliseconds per call are listed too.
    Raises ValueError if the pipeline is not accelerated.
    """
    if isinstance(model, FlowModel):
        return str(model.captures)
    state = _state_of(model)
    lines = [
        f"plan {state.plan}: {state.plan.cost.predictor} predictor and {state.plan.cost.refiner} "
        "refiner calls a run"
    ]
    meter = state.scheduler.meter
    per_call = ""
    if meter.timed:
        per_call = f", {1e3 * meter.seconds / meter.timed:.2f} ms each on the host"
    lines.append(f"{meter.calls} predictor calls so far{per_call}")
    if state.captures is not None:
        lines += [
            f"captured for {c.key.size} rows: {c.memory / 2**20:.0f} MiB, replayed {c.hits} times"
            for c in state.captures.report()
        ]
        lines += [f"not captured: {why}" for why in state.captures.refused().values()]
    return "\n".join(lines)


def _state_of(pipe: Any) -> Accelerated:
    state = vars(pipe).get(MARK) if hasattr(pipe, "__dict__") else None
    if state is None:
        raise ValueError(
            "this pipeline is not accelerated: accelerate it itself, also if it was made from one "
            "that is"
        )
    return state
