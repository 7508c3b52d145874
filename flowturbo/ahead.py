"""compile() captures runs before they are needed; summary() tells what is captured and what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from .checks import positive
from .graph import Capture, CaptureError
from .integrations import diffusers as integrations
from .job import Job
from .models import FlowModel
from .models.prompted import PromptModel
from .plan import Plan, as_plan
from .sampler import inputs_of


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
    """Capture as CUDA graphs, ahead of time, what `sample` will ask for: every plan with every batch size.

    guided: whether guidance will be asked for (any scale but 1). guidance_channels, output: as in `sample`. progress: show a bar.
    prompts: for text-to-image models, one prompt as in `sample`: the shapes of its encoding are the graph's, and no more of it is.
    Afterwards a `sample` of as many images, or of fewer, replays the capture of the smallest batch size that holds them, for any
    labels, seed or noise and guidance scale. At most `model.captures.limit` are kept.
    Returns the captures, with their times and memory. On a device without CUDA graphs every run is executed once, which loads and
    compiles what it needs, and none is captured.
    Raises ValueError or TypeError for what does not fit the model, CaptureError for what can't be captured, for want of memory
    for example; the model and earlier captures then stay usable.
    """
    given = [plans] if isinstance(plans, str | Plan) else list(plans)
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if not given or not sizes:
        raise ValueError("plans and batch_sizes must name at least one each")
    guidable = not (isinstance(model, PromptModel) and model.guidance_style == "none")
    scale = 1.5 if guided and guidable else 1.0  # any scale: it is an input of the graph
    jobs = [Job.of(model, as_plan(p, model.shift), scale, guidance_channels, output, torch.float32) for p in given]
    work = list(itertools.product(jobs, [positive("batch_sizes", size) for size in sizes]))
    made = []
    for job, size in tqdm(work, disable=not progress, unit="capture", leave=False):
        noise = torch.zeros(size, *model.latent_shape)
        inputs = inputs_of(model, prompts if isinstance(model, PromptModel) else [0] * size, scale, noise, None, count=size)
        if job.can_be_captured(model):
            made.append(model.captures.ahead(*job.capture(model, inputs, scale)))
        elif model.device.type == "cuda":
            raise CaptureError(
                f"{job} can't be captured: of this model, under autocast, "
                "with model.captures.limit = 0, or while another capture is under way"
            )
        else:
            job.execute(model, guidance=scale, **inputs)
    return made


def summary(model: Any) -> str:
    """A line a capture: what it runs, milliseconds with and without the graph, memory, how often; and what failed, and why.

    model: a FlowModel, or a diffusers pipeline that `accelerate` was called on, of which it tells plan, calls and milliseconds too.
    """
    if not isinstance(model, FlowModel):
        return integrations.summary(model)
    lines = []
    for c in model.captures.report():
        gain = c.eager_seconds / c.replay_seconds if c.replay_seconds else float("nan")
        lines.append(
            f"{c.key.what}, batch {c.key.size}: {c.replay_seconds * 1e3:.2f} ms a replay, {c.eager_seconds * 1e3:.2f} ms without "
            f"a graph ({gain:.2f} times), {c.memory / 2**20:.0f} MiB, captured in {c.seconds:.2f} s"
            f"{' ahead of time' if c.ahead else ''}, replayed {c.hits} times"
        )
    lines += [f"{key.what}, batch {key.size}: without a graph, since {why}" for key, why in model.captures.refused().items()]
    return "\n".join(lines) or "nothing is captured"
