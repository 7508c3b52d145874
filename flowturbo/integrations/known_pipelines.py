"""What is known of diffusers' pipelines: which a plan runs in, and why not in others."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch

from ..solver.plan import Plan
from .masked_class import stock_class
from .planned_pipeline import counts_steps
from .tested_pipelines import TESTED

DIVIDE_BY_NOISE_LEVEL = ("LTX2", "Cosmos2Text", "Cosmos2Video", "PRXPixel")
"""How the names of pipelines begin that divide by the noise level of a call."""

_OWN_LEVELS = "it is distilled for the noise levels that it sets itself"
REFUSED = {
    "HeliosPyramidPipeline": "it changes the resolution between its stages by itself",
    "LTX2DFRPipeline": _OWN_LEVELS,
    "LTX2DFRTemporalRefinePipeline": _OWN_LEVELS,
    "LTX2VideoDiffusionDecodePipeline": "its decoder takes its steps without the scheduler",
    "LTXI2VLongMultiPromptPipeline": "it is made for a scheduler that adds noise in every step",
    "SanaWMLTX2Refiner": _OWN_LEVELS,
}
"""Pipelines that no plan can run in, by name, and why."""


def check_kind(pipe: Any) -> None:
    """Raise TypeError for a pipeline that no plan can run in."""
    name = stock_class(type(pipe)).__name__
    if refused := next((REFUSED[one] for one in _names(pipe) if one in REFUSED), ""):
        raise TypeError(f"plans can't run in {name}: {refused}")
    if not counts_steps(pipe):
        raise TypeError(
            f"plans can't run in {name}: it takes no num_inference_steps, so {_OWN_LEVELS}"
        )
    if any("per_token_timesteps=" in _source(kind) for kind in _kinds(pipe)):
        raise TypeError(
            f"plans can't run in {name}: it gives each token a time of its own, and a plan has one "
            "for all"
        )


def check_plan(pipe: Any, scheduler: Any) -> None:
    """Raise ValueError for a plan, that of `scheduler`, that this pipeline can't run.

    A pipeline that was never tried is rehearsed, with a warning, or TypeError if that fails.
    """
    check_steps(pipe, scheduler.plan)
    name = stock_class(type(pipe)).__name__
    if name not in TESTED:
        _rehearse(name, pipe.scheduler)


def check_steps(pipe: Any, plan: Plan) -> None:
    """Raise ValueError for a plan with steps that this pipeline can't run."""
    name = stock_class(type(pipe)).__name__
    divides = any(one.startswith(DIVIDE_BY_NOISE_LEVEL) for one in _names(pipe))
    if divides and plan.calls_at_data:
        raise ValueError(
            f"plan must not call the network at noise level 0, by which {name} divides, got "
            f"{plan}: choose one that ends in a one-call step, such as A7 or H1P4E1"
        )
    if plan.letters.strip("E") and _mean_velocity(pipe):
        raise ValueError(
            f"plan must have E steps alone for the mean velocities that this {name} predicts, each "
            f"over one step, got {plan}"
        )


def _kinds(pipe: Any) -> list[type[Any]]:
    """The pipeline's class and those that it extends, up to the common base of diffusers."""
    kinds = [kind for kind in stock_class(type(pipe)).__mro__ if kind.__module__ != "builtins"]
    bases = ("DiffusionPipeline", "ModularPipeline")
    end = next((i for i, kind in enumerate(kinds) if kind.__name__ in bases), len(kinds))
    return kinds[:end] or kinds[:1]


def _names(pipe: Any) -> list[str]:
    return [kind.__name__ for kind in _kinds(pipe)]


def _rehearse(name: str, stock: Any) -> None:
    """Try what an unknown pipeline will ask of its scheduler; warn that it is untested.

    Raises TypeError if Euler steps fail or come out otherwise than by hand.
    """
    from .scheduler import PlanScheduler

    planned = PlanScheduler.of(copy.deepcopy(stock), "E4")
    try:
        dynamic = {"mu": 1.0} if stock.config.get("use_dynamic_shifting") else {}
        planned.set_timesteps(4, **dynamic)
        x = torch.linspace(-1, 1, 8, dtype=torch.float32, device="cpu")[None]
        by_hand, sigmas = x.clone(), planned.sigmas.tolist()
        for i, t in enumerate(planned.timesteps):
            by_hand = by_hand + (sigmas[i + 1] - sigmas[i]) * torch.sin(3 * by_hand)
            x = planned.step(torch.sin(3 * x), t, x, return_dict=False)[0]
        right = torch.allclose(x, by_hand, rtol=1e-4, atol=1e-4)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise TypeError(f"plans can't run in {name}: {error}") from error
    if not right:
        raise TypeError(f"plans can't run in {name}: Euler steps on its levels come out otherwise")
    warnings.warn(
        f"plans are untested in {name}: compare a plan of Euler steps, such as E28, with the stock "
        "pipeline at 28 steps",
        stacklevel=4,
    )


def _mean_velocity(pipe: Any) -> bool:
    """Whether the network is told the end of a step as well (HunyuanImage's distilled models)."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    return any(getattr(config, name, False) for name in ("use_meanflow", "flow_map"))


def _source(kind: type[Any]) -> str:
    try:
        return inspect.getsource(stock_class(kind))
    except (OSError, TypeError):  # a class made in a shell
        return ""
