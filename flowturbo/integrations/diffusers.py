"""accelerate() and restore(): plans inside diffusers pipelines.

With a plan come, if asked for, a refiner, fused kernels and CUDA graphs. Only the objects of this
pipeline are changed, never a class.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.flow_model import FlowModel
from ..models.pipelines import move_part
from ..models.text_to_image import KINDS, check_refiner
from ..runtime.cuda_graphs import Captures
from ..solver.plan import Plan, as_plan
from .transformer import AttachedRefiner, Graphed, Undo, fuse_adaln, patch

if TYPE_CHECKING:
    from .scheduler import Grid, PlanScheduler

_MARK = "_flowturbo"
_STOCK = ("diffusers", "FlowMatchEulerDiscreteScheduler")


@dataclass
class Accelerated:
    """The changes to a pipeline, and statistics since then.

    before: the pipeline's own scheduler.
    undo: functions that undo the changes, in the order they were made.
    calls, seconds: of the predictor; seconds on the host.
    """

    plan: Plan
    before: Any
    scheduler: PlanScheduler
    captures: Captures | None = None
    undo: list[Undo] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0


def accelerate(
    pipe: Any,
    plan: str | Plan,
    refiner: nn.Module | str | os.PathLike[str] | None = None,
    *,
    graph: bool = False,
    grid: Grid = "auto",
) -> Any:
    """Make a diffusers flow-matching pipeline (SD3, FLUX, ...) sample by a plan.

    The pipeline is called as before and makes the predictor calls of the plan; num_inference_steps
    is ignored.
    plan: a Plan, or text such as "H1P5".
    refiner: for plans with R or S steps, a network as `refiner_for` makes it, or the folder it was
        saved to. It gets the prompts, guidance and other arguments of the transformer's last call.
    graph: fuse the transformer's adaLN, and on CUDA replay it as a CUDA graph, at most eight, one
        per shape of its inputs. Changes of a LoRA other than of its weights (set_adapters) are not
        noticed: restore, and accelerate again.
    grid: the noise levels; see integrations.scheduler.PlanScheduler.
    LoRAs, ControlNets, callbacks, generators, image-to-image and inpainting work as before. Several
    threads may share the pipeline.
    Returns the pipeline. Raises ValueError if it is accelerated already or the refiner does not fit
    the plan, TypeError if its scheduler is not FlowMatchEulerDiscreteScheduler or its network is
    unknown.
    """
    if not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}"
        )
    from .scheduler import PlanScheduler

    if isinstance(pipe.scheduler, PlanScheduler):
        raise ValueError(
            f"this pipeline is accelerated by plan {pipe.scheduler.plan} already: restore it first"
        )
    plan = as_plan(plan)
    if bool(plan.cost.refiner) != (refiner is not None):
        problem = (
            "has refiner steps: give a refiner"
            if plan.cost.refiner
            else "has no refiner steps, but a refiner was given"
        )
        raise ValueError(f"plan {plan} {problem}")
    scheduler = PlanScheduler.of(pipe.scheduler, plan, grid)
    network = getattr(pipe, "transformer", None)
    if (refiner is not None or graph) and type(network).__name__ not in KINDS:
        raise TypeError(
            f"refiner and graph know the transformers {', '.join(KINDS)}, not "
            f"{type(network).__name__}"
        )
    refiner_network = None if refiner is None else check_refiner(refiner, network)

    state = Accelerated(plan, pipe.scheduler, scheduler)
    if refiner_network is not None:
        assert network is not None
        move_part(refiner_network, network.device, network.dtype)
        scheduler.refiner = AttachedRefiner(pipe, network, refiner_network.eval())
        state.undo.append(scheduler.refiner.remove)
    if graph:
        assert network is not None
        state.undo += fuse_adaln(network)
        state.captures = Captures()
        state.undo.append(Graphed(network, state.captures).remove)
    if callable(getattr(pipe, "get_timesteps", None)):
        ours = functools.partial(_timesteps_of_the_plan, pipe.get_timesteps, scheduler)
        state.undo.append(patch(pipe, "get_timesteps", ours))
    if isinstance(network, nn.Module):
        state.undo += _counted(network, state)
    pipe.scheduler = scheduler
    # A pipeline is saved with the classes of its components, and could not be loaded with ours.
    pipe.register_to_config(scheduler=_STOCK)
    state.undo.append(patch(pipe, _MARK, state))
    return pipe


def restore(pipe: Any) -> Any:
    """Undo accelerate, to the bit -> the pipeline.

    Raises ValueError if it is not accelerated.
    """
    state = _state_of(pipe)
    for undo in reversed(state.undo):
        undo()
    pipe.scheduler = state.before
    if state.captures is not None:
        state.captures.clear()
    return pipe


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
    per_call = ""
    if state.calls:
        per_call = f", {1e3 * state.seconds / state.calls:.2f} ms each on the host"
    lines.append(f"{state.calls} predictor calls so far{per_call}")
    if state.captures is not None:
        lines += [
            f"captured for {c.key.size} rows: {c.memory / 2**20:.0f} MiB, replayed {c.hits} times"
            for c in state.captures.report()
        ]
        lines += [f"not captured: {why}" for why in state.captures.refused().values()]
    return "\n".join(lines)


def _state_of(pipe: Any) -> Accelerated:
    state = vars(pipe).get(_MARK) if hasattr(pipe, "__dict__") else None
    if state is None:
        raise ValueError("this pipeline is not accelerated")
    return state


def _timesteps_of_the_plan(
    original: Callable[..., Any],
    scheduler: PlanScheduler,
    num_inference_steps: int,
    *rest: Any,
    **more: Any,
) -> Any:
    """The get_timesteps of image-to-image pipelines, with the number of the plan's calls.

    They would count from num_inference_steps.
    """
    return original(len(scheduler.timesteps), *rest, **more)


def _counted(network: nn.Module, state: Accelerated) -> list[Undo]:
    """Count the network's calls, and time them on the host -> functions that undo it."""
    clock, lock = threading.local(), threading.Lock()

    def before(*_: Any) -> None:
        clock.start = time.perf_counter()

    def after(*_: Any) -> None:
        with lock:
            state.calls += 1
            state.seconds += time.perf_counter() - clock.start

    return [
        network.register_forward_pre_hook(before).remove,
        network.register_forward_hook(after).remove,
    ]
