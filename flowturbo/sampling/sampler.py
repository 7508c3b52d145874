"""sample(): from noise to latents or images along a plan, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..models.flow_model import FlowModel, VelocityFunction
from ..models.text_to_image import PromptModel
from ..solver.plan import Plan
from ..solver.stages import StagedPlan, as_stages
from .batches import ModelBatches, Watch
from .enlarge import Enlarge, enlarger
from .function_field import Convention, FunctionField, check_function
from .inputs import drawn_seed, image_names, inputs_of, starting_noise
from .run import Callback, StepMonitor, both_ends, integrate
from .stages import (
    Leg,
    StageBatches,
    function_legs,
    leg_job,
    model_legs,
    sample_legs,
)


@torch.no_grad()
def sample(
    model: FlowModel | VelocityFunction,
    plan: str | Plan | StagedPlan,
    labels: int | str | Sequence[int | str] | np.ndarray | Tensor | None = None,
    *,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    batch_size: int | Sequence[int] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    output: Literal["latents", "uint8"] = "latents",
    convention: Convention = "time",
    enlarge: Enlarge = "latents",
    **cond: Any,
) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise at t = 0 to data at t = 1 along a plan.

    model: a FlowModel (from `load`), or any callable v(x, t, **cond) with t a scalar tensor, which
        needs `noise`. It returns the velocity, floating point, in x's shape and on its device.
    plan: a Plan, or text such as "H1P5R3". The grid of a text is uniform, except for models with a
        shift of their own (SD3, FLUX). For models of any size (text to image, callables), and for
        stages at sizes that a model was trained on, also a StagedPlan, or text such as
        "A4 at 1/2 + A3 from 0.6". Or the name of a plan that the model's file holds, one of
        `model.plans`.
    labels: N class numbers, or names of `model.class_names`; None: unconditional, one image per row
        of `noise`. For a text-to-image model N prompts, or what its `encode` returns for them. A
        callable gets them as cond "labels".
    guidance: the scale s of classifier-free guidance, u + s * (c - u); 1: none. Other scales need
        labels and a null class.
    guidance_channels: how many channels, from the first, are guided; None: as the checkpoint's
        convention says (3 of 4 for SiT, else all).
    noise: (N, C, H, W), finite, floating point. It overrides seed.
    seed: the noise of image i depends on (seed, i) alone; None: another seed in every call. Of a
        model that was resized it is `resized_noise` of that at its own size.
    batch_size: images per batch; None: the smallest batch size that `compile` captured and that
        holds all images, else all at once. The last batch is padded to this size. So for one batch
        size, device and machine an image does not depend on the others in its batch; between batch
        sizes it agrees up to rounding. For a plan with stages also one number for each stage: a
        small stage fills the device only with more images.
    progress: show a bar of steps.
    callback: called with a StepInfo after each step. If it returns False, sampling ends at once and
        returns the latents as they are, of the batches that were started.
    output: "latents", or "uint8" to decode each batch.
    convention: of a callable. "time": it is called with the time t and returns data - noise;
        "sigma": with the noise level sigma = 1 - t, and it returns noise - data, as networks of
        diffusers and ComfyUI do.
    enlarge: how a plan with stages enlarges images. "latents": by cubic interpolation of the
        latents; "pixels": the same of the decoded images; a callable or module: of the decoded
        images (n, 3, height, width), in [0, 1], by this network, to any larger size;
        ("latents", f): of latents x (n, C, h, w), by f(x, (H, W)).
    cond: further arguments of a callable; tensors, arrays and lists of N entries are cut into
        batches. For a text-to-image model `negative`: the prompts to guide away from.

    On CUDA the second batch of a kind is captured as a CUDA graph, from noise to decoded images,
    and replayed from then on, for any labels, seed and guidance scale. A callback prevents that.
    Several threads may sample from one model.

    Returns latents (N, C, H, W), float32 (float64 for float64 noise), or images (N, height, width,
    3), uint8, on the model's device.
    Raises ValueError or TypeError, naming the argument, for input that does not fit; with
    output="uint8" NotFiniteError, a FloatingPointError, for latents or pixels with NaN or infinity,
    which names the images and has all of them as `images`. In latents NaN can be seen, and reading
    them would wait for the device: they are returned as they are.
    """
    plan = model.find_plan(plan) if isinstance(model, FlowModel) else as_stages(plan)
    if isinstance(plan, Plan) and plan.start:
        raise ValueError(
            f"plan must start at 0, got one that starts at {plan.start:g}: that is for edit, "
            "which starts from a source"
        )
    watch = Watch(progress, callback)
    runs: Sequence[StageBatches]
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
        legs = model_legs(model, plan)
        jobs = [leg_job(model, leg, guidance, guidance_channels, output, dtype) for leg in legs]
        enlarging = enlarger(enlarge, model.vae, len(legs))
        seed = drawn_seed(seed, noise)
        inputs = inputs_of(model, labels, guidance, noise, seed, negative)
        start, names = inputs["noise"], image_names(model, labels, seed, noise, inputs)
        runs = [
            ModelBatches(model.at_size(leg.size), job, inputs, guidance, names)
            for leg, job in zip(legs, jobs, strict=True)
        ]
    else:
        if labels is not None:
            cond["labels"] = labels
        check_function(model, convention)
        start = _plain_function(plan, guidance, guidance_channels, noise, seed, output)
        legs = function_legs(plan, start)
        enlarging = enlarger(enlarge, None, len(legs))
        runs = [_FunctionBatches(model, leg, len(start), cond, convention) for leg in legs]
    result = sample_legs(legs, runs, start, enlarging, batch_size, watch)
    if isinstance(model, FlowModel) and output == "uint8" and result.is_floating_point():
        return model.decode(result)  # of a small stage, which the callback has ended
    return runs[-1].checked(result)


class _FunctionBatches:
    """Batches of a plain function, of one stage. size: the number of all images."""

    def __init__(
        self,
        function: VelocityFunction,
        leg: Leg,
        size: int,
        cond: dict[str, Any],
        convention: Convention,
    ) -> None:
        self.function, self.leg, self.size = function, leg, size
        self.cond, self.convention = cond, convention

    def run_from(self, start: Tensor, rows: Tensor, monitor: StepMonitor) -> Tensor:
        cond = {name: self._pick(value, rows) for name, value in self.cond.items()}
        field = FunctionField(self.function, cond, self.convention)
        state = integrate(self.leg.plan, field, start, monitor)
        whole = self.leg.last or monitor.stopped
        return state.x if whole else both_ends(state, self.leg.plan.end)

    def checked(self, result: Tensor) -> Tensor:
        return result

    def _pick(self, value: Any, rows: Tensor) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == self.size:
            return value[rows.to(value.device)]
        if isinstance(value, np.ndarray) and value.ndim and len(value) == self.size:
            return value[rows.cpu().numpy()]
        if isinstance(value, list | tuple | range) and len(value) == self.size:
            return [value[i] for i in rows.tolist()]
        return value


def _plain_function(
    plan: Plan | StagedPlan,
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
