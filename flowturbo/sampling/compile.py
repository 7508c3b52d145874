"""compile(): capture runs before they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from ..checks import positive
from ..models.flow_model import FlowModel
from ..models.text_to_image import PromptModel
from ..runtime.cuda_graphs import Capture, CaptureError
from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from .inputs import inputs_of
from .stages import leg_job, model_legs


@torch.no_grad()
def compile(
    model: FlowModel,
    plans: str | Plan | StagedPlan | Iterable[str | Plan | StagedPlan],
    batch_sizes: int | Iterable[int] = 1,
    *,
    guided: bool = True,
    guidance_channels: int | None = None,
    output: Literal["latents", "uint8"] = "latents",
    progress: bool = False,
    prompts: Any = "",
) -> list[Capture]:
    """Capture in advance, as CUDA graphs, every plan, or every stage, with every batch size.

    Afterwards `sample` on that many images, or fewer, replays the capture of the smallest batch
    size that holds them, for any labels, noise and guidance scale.
    guided: whether `sample` will be called with guidance (any scale but 1).
    guidance_channels, output: as in `sample`.
    progress: show a bar of captures.
    prompts: for text-to-image models, one prompt as in `sample`. Only the shapes of its encoding
        matter.
    Returns the captures, with their times and memory; at most `model.captures.limit` are kept. On a
    device without CUDA graphs every run is executed once, which compiles what it needs, and the
    list is empty.
    Raises ValueError or TypeError for what does not fit the model, and CaptureError for what can't
    be captured, for example for lack of memory. The model and earlier captures stay usable.
    """
    plan_list = [plans] if isinstance(plans, str | Plan | StagedPlan) else list(plans)
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if not plan_list or not sizes:
        raise ValueError("plans and batch_sizes must name at least one each")
    guidable = not (isinstance(model, PromptModel) and model.guidance_style == "none")
    scale = 1.5 if guided and guidable else 1.0  # any scale: it is an input of the graph
    legs = [leg for p in plan_list for leg in model_legs(model, model.find_plan(p))]
    jobs = [leg_job(model, leg, scale, guidance_channels, output, torch.float32) for leg in legs]
    work = list(itertools.product(jobs, [positive("batch_sizes", size) for size in sizes]))
    captures = []
    for job, size in tqdm(work, disable=not progress, unit="capture", leave=False):
        noise = torch.zeros(size, *job.latent_shape, dtype=torch.float32, device="cpu")
        sized = model.at_size(job.latent_shape[1:])
        inputs = inputs_of(
            sized,
            prompts if isinstance(model, PromptModel) else [0] * size,
            scale,
            noise,
            None,
            count=size,
        )
        if job.can_be_captured(model):
            captures.append(model.captures.precapture(*job.capture(sized, inputs, scale)))
        elif model.device.type == "cuda":
            raise CaptureError(
                f"{job} can't be captured: of this model, under autocast, "
                "with model.captures.limit = 0, or while another capture is under way"
            )
        else:
            job.execute(sized, guidance=scale, **inputs)
    return captures
