"""Nodes that make ComfyUI's SAMPLER and SIGMAS of a plan.

ComfyUI guides, inpaints, shows previews and interrupts as with its own samplers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import folder_paths
import torch

from flowturbo import Plan
from flowturbo.integrations.k_diffusion import PlanSampler

FOLDER = "flowturbo"
"""The folder of plan files, in ComfyUI's folder of models."""
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

_PLAN = (
    "STRING",
    {
        "default": "A7",
        "tooltip": "Letters of steps with counts, such as A7 or H1P4E1, or the name of a .json "
        f"file in models/{FOLDER}. As many steps as there are letters.",
    },
)


def plan_of(text: str) -> Plan:
    """The plan of a text, or of a file in the folder of plans.

    Raises ValueError for anything else.
    """
    text = text.strip()
    if not text.endswith(".json"):
        return Plan.parse(text)
    path = folder_paths.get_full_path(FOLDER, text)
    if path is None:
        raise ValueError(f"there is no plan file {text!r} in models/{FOLDER}")
    return Plan.load(path)


def flow_sampling(model: Any) -> Any:
    """The noise levels of a model. model: ComfyUI's MODEL, a patcher.

    Raises ValueError if it is no flow model, that is, none of ComfyUI's kind CONST.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        kinds = ", ".join(kind.__name__ for kind in type(sampling).__mro__[1:-1])
        raise ValueError(
            "a plan needs a flow model, such as SD3, FLUX, Qwen-Image or Wan; this model predicts "
            f"in another way ({kinds}): take another sampler"
        )
    return sampling


class FlowSampler(PlanSampler):
    """PlanSampler that refuses models that are no flow models."""

    def __call__(self, model: Any, *args: Any, **options: Any) -> torch.Tensor:
        """model: ComfyUI's, in which inner_model is the guider."""
        flow_sampling(model.inner_model.model_patcher)
        return super().__call__(model, *args, **options)


class _PlanNode:
    """What the nodes with a plan have in common."""

    CATEGORY = "sampling/flowturbo"

    @classmethod
    def VALIDATE_INPUTS(cls, plan: str | None = None) -> bool | str:
        """Before anything runs: True, or what is wrong with the plan.

        plan: None if another node makes it.
        """
        try:
            if plan is not None:
                PlanSampler(plan_of(plan))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, plan: str | None = None, **others: Any) -> str:
        """What the node's result depends on: a file may change under its name."""
        return "" if plan is None else repr(plan_of(plan))


class FlowTurboSampler(_PlanNode):
    """A SAMPLER that takes the steps of a plan."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make"
    DESCRIPTION = (
        "Samples a flow model by a plan of solver steps. Give it as many steps of sigmas as the "
        "plan has: FlowTurbo Sigmas does."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"plan": _PLAN}}

    def make(self, plan: str) -> tuple[Any]:
        return (comfy.samplers.KSAMPLER(FlowSampler(plan_of(plan))),)


class FlowTurboSigmas(_PlanNode):
    """The SIGMAS of a plan for a model, and the number of model calls."""

    RETURN_TYPES = ("SIGMAS", "INT")
    RETURN_NAMES = ("sigmas", "calls")
    FUNCTION = "make"
    DESCRIPTION = (
        "The noise levels of a plan. Grid model: even steps, moved by the model's shift; plan: the "
        "plan's own; auto: the plan's own if it has any."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        grids = (["auto", "model", "plan"],)
        return {
            "required": {
                "model": ("MODEL",),
                "plan": _PLAN,
                "denoise": ("FLOAT", denoise),
                "grid": grids,
            }
        }

    def make(
        self, model: Any, plan: str, denoise: float = 1.0, grid: str = "auto"
    ) -> tuple[torch.Tensor, int]:
        """denoise: below 1 all steps are taken on the last part of the grid; 0: no sigmas."""
        sampling, steps = flow_sampling(model), plan_of(plan)
        if denoise <= 0:
            return torch.zeros(0), 0
        even = [i / len(steps) for i in range(len(steps) + 1)]
        own = bool(steps.weights) or any(
            abs(a - b) > 1e-12 for a, b in zip(steps.grid, even, strict=True)
        )
        if grid == "plan" or (grid == "auto" and own):
            times = steps.grid if denoise == 1 else steps.starting_at(1 - denoise).grid
            sigmas = [1 - t for t in times]
        else:
            shifted: Callable[[float], float] = sampling.percent_to_sigma
            sigmas = [float(shifted(1 - denoise + denoise * t)) for t in even[:-1]] + [0.0]
        return torch.tensor(sigmas, dtype=torch.float32), steps.cost.predictor


class FlowTurboPlanFile:
    """The name of a plan file, chosen from a list, for the plan of the other nodes."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("plan",)
    FUNCTION = "make"
    CATEGORY = _PlanNode.CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [n for n in folder_paths.get_filename_list(FOLDER) if n.endswith(".json")]
        return {"required": {"file": (names,)}}

    def make(self, file: str) -> tuple[str]:
        return (file,)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    kind.__name__: kind for kind in (FlowTurboSampler, FlowTurboSigmas, FlowTurboPlanFile)
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "FlowTurboSampler": "FlowTurbo Sampler",
    "FlowTurboSigmas": "FlowTurbo Sigmas",
    "FlowTurboPlanFile": "FlowTurbo Plan File",
}
