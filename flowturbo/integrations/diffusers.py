"""accelerate(): a plan, and if wanted a refiner, fused kernels and CUDA graphs, inside a diffusers
pipeline; restore() undoes it.

Only this pipeline's own objects are touched, never a class.
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
from .transformer import Graphed, Refining, Undo, fuse_adaln, patch

if TYPE_CHECKING:
    from .scheduler import Grid, PlanScheduler

_MARK = "_flowturbo"
_STOCK = ("diffusers", "FlowMatchEulerDiscreteScheduler")


@dataclass
class Accelerated:
    """What was done to a pipeline, and what it has done since. seconds: on the host, of the
    predictor's calls.
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
    """Let a diffusers flow-matching pipeline (SD3, FLUX, ...) sample by a plan: called as before,
    it makes the plan's calls.

    plan: a Plan, or text such as "H1P5". num_inference_steps then means nothing.
    refiner: for plans with R or S steps, a network as `refiner_for` makes it, or the folder it was
        saved to; prompts, guidance and whatever else the transformer is told are taken from its
        last call.
    graph: run the transformer with fused adaLN kernels, and on CUDA as a graph for each shape of
        its inputs, at most eight. What is changed in a LoRA later, other than its weights
        (set_adapters), is not noticed: restore, and accelerate again.
    grid: which noise levels: see integrations.scheduler.PlanScheduler.
    LoRAs, ControlNets, callbacks, generators, image-to-image and inpainting work as before; threads
    may share the pipeline. Returns the pipeline. Raises ValueError where it is accelerated already,
    TypeError where its scheduler is no flow matching's.
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
        what = (
            "has refiner steps: give a refiner"
            if plan.cost.refiner
            else "has no refiner steps, but a refiner was given"
        )
        raise ValueError(f"plan {plan} {what}")
    scheduler = PlanScheduler.of(pipe.scheduler, plan, grid)
    network = getattr(pipe, "transformer", None)
    if (refiner is not None or graph) and type(network).__name__ not in KINDS:
        raise TypeError(
            f"refiner and graph know the transformers {', '.join(KINDS)}, not "
            f"{type(network).__name__}"
        )
    module = None if refiner is None else check_refiner(refiner, network)

    done = Accelerated(plan, pipe.scheduler, scheduler)
    if module is not None:
        assert network is not None
        move_part(module, network.device, network.dtype)
        scheduler.refiner = Refining(pipe, network, module.eval())
        done.undo.append(scheduler.refiner.remove)
    if graph:
        assert network is not None
        done.undo += fuse_adaln(network)
        done.captures = Captures()
        done.undo.append(Graphed(network, done.captures).remove)
    if callable(getattr(pipe, "get_timesteps", None)):
        ours = functools.partial(_timesteps_of_the_plan, pipe.get_timesteps, scheduler)
        done.undo.append(patch(pipe, "get_timesteps", ours))
    if isinstance(network, nn.Module):
        done.undo += _counted(network, done)
    pipe.scheduler = scheduler
    # A pipeline is saved with the class of each of its parts: with ours it could not be loaded
    # again.
    pipe.register_to_config(scheduler=_STOCK)
    done.undo.append(patch(pipe, _MARK, done))
    return pipe


def restore(pipe: Any) -> Any:
    """Undo accelerate, to the bit -> the pipeline. ValueError where it is not accelerated."""
    done = _done(pipe)
    for undo in reversed(done.undo):
        undo()
    pipe.scheduler = done.before
    if done.captures is not None:
        done.captures.clear()
    return pipe


@contextmanager
def accelerated(pipe: Any, plan: str | Plan, *args: Any, **options: Any) -> Iterator[Any]:
    """accelerate inside, restore after."""
    accelerate(pipe, plan, *args, **options)
    try:
        yield pipe
    finally:
        restore(pipe)


def summary(model: Any) -> str:
    """A line a capture: what it runs, milliseconds with and without the graph, memory, how often;
    and what failed, and why.

    model: a FlowModel, or a diffusers pipeline that `accelerate` was called on, of which it tells
    plan, calls and milliseconds too. ValueError where the pipeline is not accelerated.
    """
    if isinstance(model, FlowModel):
        return str(model.captures)
    done = _done(model)
    lines = [
        f"plan {done.plan}: {done.plan.cost.predictor} predictor and {done.plan.cost.refiner} "
        "refiner calls a run"
    ]
    each = f", {1e3 * done.seconds / done.calls:.2f} ms each on the host" if done.calls else ""
    lines.append(f"{done.calls} predictor calls so far{each}")
    if done.captures is not None:
        lines += [
            f"captured for {c.key.size} rows: {c.memory / 2**20:.0f} MiB, replayed {c.hits} times"
            for c in done.captures.report()
        ]
        lines += [f"not captured: {why}" for why in done.captures.refused().values()]
    return "\n".join(lines)


def _done(pipe: Any) -> Accelerated:
    done = vars(pipe).get(_MARK) if hasattr(pipe, "__dict__") else None
    if done is None:
        raise ValueError("this pipeline is not accelerated")
    return done


def _timesteps_of_the_plan(
    original: Callable[..., Any],
    scheduler: PlanScheduler,
    num_inference_steps: int,
    *rest: Any,
    **more: Any,
) -> Any:
    """Image-to-image pipelines count from the number of steps they asked for; the plan has as many
    as it makes calls.
    """
    return original(len(scheduler.timesteps), *rest, **more)


def _counted(network: nn.Module, done: Accelerated) -> list[Undo]:
    """Count the network's calls and their time on the host."""
    began, lock = threading.local(), threading.Lock()

    def before(*_: Any) -> None:
        began.at = time.perf_counter()

    def after(*_: Any) -> None:
        with lock:
            done.calls += 1
            done.seconds += time.perf_counter() - began.at

    return [
        network.register_forward_pre_hook(before).remove,
        network.register_forward_hook(after).remove,
    ]
