"""compile() captures runs before they are needed; summary() tells what is captured and what it
costs.
"""

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
from ..solver.plan import Plan, as_plan
from .inputs import inputs_of
from .run import Job


@torch.no_grad()
def compile(
    model: FlowModel,
    plans: str | Plan | Iterable[str | Plan],
    batch_sizes: int | Iterable[int] = 1,
    *,
    guided: bool = True,
    guidance_channels: int | None = None,
    output: Literal["latents", "uint8"] = "latents",
    progress: bool = False,
    prompts: Any = "",
) -> list[Capture]:
    """Capture as CUDA graphs, ahead of time, what `sample` will ask for: every plan with every
    batch size.

    guided: whether guidance will be asked for (any scale but 1). guidance_channels, output: as in
        `sample`. progress: show a bar.
    prompts: for text-to-image models, one prompt as in `sample`: the shapes of its encoding are the
    graph's, and no more of it is. Afterwards a `sample` of as many images, or of fewer, replays the
    capture of the smallest batch size that holds them, for any labels, seed or noise and guidance
    scale. At most `model.captures.limit` are kept. Returns the captures, with their times and
    memory. On a device without CUDA graphs every run is executed once, which loads and compiles
    what it needs, and none is captured. Raises ValueError or TypeError for what does not fit the
    model, CaptureError for what can't be captured, for want of memory for example; the model and
    earlier captures then stay usable.
    """
    given = [plans] if isinstance(plans, str | Plan) else list(plans)
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if not given or not sizes:
        raise ValueError("plans and batch_sizes must name at least one each")
    guidable = not (isinstance(model, PromptModel) and model.guidance_style == "none")
    scale = 1.5 if guided and guidable else 1.0  # any scale: it is an input of the graph
    jobs = [
        Job.of(model, as_plan(p, model.shift), scale, guidance_channels, output, torch.float32)
        for p in given
    ]
    work = list(itertools.product(jobs, [positive("batch_sizes", size) for size in sizes]))
    made = []
    for job, size in tqdm(work, disable=not progress, unit="capture", leave=False):
        noise = torch.zeros(size, *model.latent_shape)
        inputs = inputs_of(
            model,
            prompts if isinstance(model, PromptModel) else [0] * size,
            scale,
            noise,
            None,
            count=size,
        )
        if job.can_be_captured(model):
            made.append(model.captures.precapture(*job.capture(model, inputs, scale)))
        elif model.device.type == "cuda":
            raise CaptureError(
                f"{job} can't be captured: of this model, under autocast, "
                "with model.captures.limit = 0, or while another capture is under way"
            )
        else:
            job.execute(model, guidance=scale, **inputs)
    return made
