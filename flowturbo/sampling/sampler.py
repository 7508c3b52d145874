"""sample(): from noise to latents or images along a plan, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import positive
from ..models.flow_model import FlowModel, VelocityFunction
from ..models.text_to_image import PromptModel
from ..solver.plan import Plan, as_plan
from .function_field import Convention, FunctionField, check_function
from .inputs import inputs_of, starting_noise
from .run import Callback, Job, StepMonitor, integrate


@torch.no_grad()
def sample(
    model: FlowModel | VelocityFunction,
    plan: str | Plan,
    labels: int | Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    output: Literal["latents", "uint8"] = "latents",
    convention: Convention = "time",
    **cond: Any,
) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise at t = 0 to data at t = 1 along a plan.

    model: a FlowModel (from `load`), or any callable v(x, t, **cond) with t a scalar tensor, which
        needs `noise`. It returns the velocity, floating point, in x's shape and on its device.
    plan: a Plan, or text such as "H1P5R3". The grid of a text is uniform, except for models with a
        shift of their own (SD3, FLUX).
    labels: N class numbers; None: unconditional, one image per row of `noise`. For a text-to-image
        model N prompts, or what its `encode` returns for them. A callable gets them as cond
        "labels".
    guidance: the scale s of classifier-free guidance, u + s * (c - u); 1: none. Other scales need
        labels and a null class.
    guidance_channels: how many channels, from the first, are guided; None: as the checkpoint's
        convention says (3 of 4 for SiT, else all).
    noise: (N, C, H, W), finite, floating point. It overrides seed.
    seed: the noise of image i depends on (seed, i) alone; None: another seed in every call.
    batch_size: images per batch; None: the smallest batch size that `compile` captured and that
        holds all images, else all at once. The last batch is padded to this size. So for one batch
        size, device and machine an image does not depend on the others in its batch; between batch
        sizes it agrees up to rounding.
    progress: show a bar of steps.
    callback: called with a StepInfo after each step. If it returns False, sampling ends at once and
        returns the latents as they are, of the batches that were started.
    output: "latents", or "uint8" to decode each batch.
    convention: of a callable. "time": it is called with the time t and returns data - noise;
        "sigma": with the noise level sigma = 1 - t, and it returns noise - data, as networks of
        diffusers and ComfyUI do.
    cond: further arguments of a callable; tensors and lists of N entries are cut into batches. For
        a text-to-image model `negative`: the prompts to guide away from.

    On CUDA the second batch of a kind is captured as a CUDA graph, from noise to decoded images,
    and replayed from then on, for any labels, seed and guidance scale. A callback prevents that.
    Several threads may sample from one model.

    Returns latents (N, C, H, W), float32 (float64 for float64 noise), or images (N, height, width,
    3), uint8, on the model's device.
    Raises ValueError or TypeError, naming the argument, for input that does not fit.
    """
    plan = as_plan(plan, model.shift if isinstance(model, FlowModel) else 1.0)
    if plan.start:
        raise ValueError(
            f"plan must start at 0, got one that starts at {plan.start:g}: that is for edit, "
            "which starts from a source"
        )
    if isinstance(model, FlowModel):
        if convention != "time":
            raise ValueError(
                f"convention={convention!r} is for a callable: a FlowModel knows its own"
            )
        negative = cond.pop("negative", None)
        if cond or (negative is not None and not isinstance(model, PromptModel)):
            raise TypeError(
                f"sample got unexpected arguments {sorted(cond) or ['negative']}: a FlowModel "
                "takes labels only"
            )
        dtype = (
            torch.float64
            if isinstance(noise, Tensor) and noise.dtype == torch.float64
            else torch.float32
        )
        job = Job.of(model, plan, guidance, guidance_channels, output, dtype)
        inputs = inputs_of(model, labels, guidance, noise, seed, negative)
        start = inputs["noise"]
        batches: Batches = ModelBatches(model, job, inputs, guidance)
    else:
        if labels is not None:
            cond["labels"] = labels
        check_function(model, convention)
        start = _plain_function(plan, guidance, guidance_channels, noise, seed, output)
        batches = _FunctionBatches(model, plan, start, cond, convention)

    return in_batches(batches, len(start), plan, batch_size, progress, callback)


class Batches(Protocol):
    """What `in_batches` runs, batch by batch."""

    size: int
    """The default number of images per batch."""

    def run(self, rows: Tensor, monitor: StepMonitor) -> Tensor:
        """The latents or images of these numbers, (len(rows), ...)."""
        ...


def in_batches(
    batches: Batches,
    N: int,
    plan: Plan,
    batch_size: int | None,
    progress: bool,
    callback: Callback | None,
) -> Tensor:
    """Run N images in batches -> (N, ...), or fewer if the callback ended it."""
    size = batches.size if batch_size is None else positive("batch_size", batch_size)
    parts = []
    with tqdm(
        total=math.ceil(N / size) * len(plan), disable=not progress, unit="step", leave=False
    ) as bar:
        for first in range(0, N, size):
            # The last batch is padded with its last image.
            rows = torch.arange(first, first + size).clamp(max=N - 1)
            monitor = StepMonitor(plan, first, min(size, N - first), bar, callback)
            parts.append(batches.run(rows, monitor)[: monitor.count])
            if monitor.stopped:
                break
    return torch.cat(parts)


class ModelBatches:
    """Batches of a FlowModel. inputs: those of its job, for all images."""

    def __init__(
        self, model: FlowModel, job: Job, inputs: dict[str, Tensor], guidance: float
    ) -> None:
        self.model, self.job, self.inputs, self.guidance = model, job, inputs, guidance
        count = len(inputs["noise"])
        self.size = model.captures.size_for(job.taking(inputs), count) or count

    def run(self, rows: Tensor, monitor: StepMonitor) -> Tensor:
        return self.job.run(
            self.model,
            {name: value[rows] for name, value in self.inputs.items()},
            self.guidance,
            monitor,
        )


class _FunctionBatches:
    """Batches of a plain function. start: the noise of all images."""

    def __init__(
        self,
        function: VelocityFunction,
        plan: Plan,
        start: Tensor,
        cond: dict[str, Any],
        convention: Convention,
    ) -> None:
        self.function, self.plan, self.start, self.cond = function, plan, start, cond
        self.size, self.convention = len(start), convention

    def run(self, rows: Tensor, monitor: StepMonitor) -> Tensor:
        cond = {name: self._pick(value, rows) for name, value in self.cond.items()}
        field = FunctionField(self.function, cond, self.convention)
        return integrate(self.plan, field, self.start[rows], monitor)

    def _pick(self, value: Any, rows: Tensor) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == len(self.start):
            return value[rows.to(value.device)]
        if isinstance(value, list | tuple) and len(value) == len(self.start):
            return [value[i] for i in rows.tolist()]
        return value


def _plain_function(
    plan: Plan,
    guidance: float,
    guidance_channels: int | None,
    noise: Tensor | None,
    seed: int | None,
    output: str,
) -> Tensor:
    """Check the other arguments of a plain function -> the noise, (N, ...)."""
    if output != "latents":
        raise ValueError(f"output must be 'latents' for a plain function, got {output!r}")
    if guidance != 1 or guidance_channels is not None:
        raise ValueError(
            "guidance is not applied to a plain function: guide inside it, or make a FlowModel "
            "with a null class"
        )
    if plan.cost.refiner:
        raise ValueError(f"plan {plan} has refiner steps, but a plain function has no refiner")
    if noise is None:
        raise ValueError("a plain function needs noise: the shape of x is not known")
    return starting_noise(noise, seed, None)
