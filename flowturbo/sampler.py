"""sample(): from noise to latents by a plan. The only loop over steps."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowturbo_kernels import use_backend

from . import rng
from .checks import finite, positive
from .field import FunctionField, field_of
from .models import FlowModel, VelocityFunction
from .path import denoised
from .plan import Plan, as_plan
from .steps import Field, State


class StepInfo(NamedTuple):
    """What a callback sees after each step.

    step: how many steps are done, of `steps`. t: the time reached. x: latents (n, C, H, W) of the images from number `first` on.
    denoised: the data that x heads for, x + (1 - t) * v, a preview that costs nothing.
    """

    step: int
    steps: int
    t: float
    first: int
    x: Tensor
    denoised: Tensor


Callback = Callable[[StepInfo], object]


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
    **cond: Any,
) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise at t = 0 to data at t = 1 by a plan.

    model: a FlowModel (from `load`), or any callable v(x, t, **cond) with t a scalar tensor, which needs `noise`.
    plan: a Plan, or text such as "H1P5R3".
    labels: N class numbers; None: unconditional, as many images as `noise` has. A callable gets them as cond "labels", if given.
    guidance: the scale s of u + s * (c - u) (classifier-free guidance), 1: none. Needs labels and a null class.
    guidance_channels: guide the first so many channels; None: the checkpoint's convention (3 of 4 for SiT's, else all).
    noise: (N, C, H, W); overrides seed. seed: image i draws its noise from (seed, i) alone; None: a new one every call.
    batch_size: images at a time; None: all. The last batch is filled up to it, so that for one batch_size, device and machine an
        image does not depend on which others are made with it; between batch sizes it agrees to rounding.
    progress: show a bar of steps. callback: called with a StepInfo after each step; returning False ends sampling at once, with
        the latents as they are then, of the batches begun.
    output: "latents", or "uint8" to decode each batch as it is done.
    cond: further arguments for a callable; tensors whose first size is N are cut into batches.

    Returns latents (N, C, H, W), float32 (float64 for float64 noise), or images (N, height, width, 3), uint8, on the model's
    device.
    Raises ValueError or TypeError, naming the argument, for input that does not fit.
    """
    plan = as_plan(plan)
    if output not in ("latents", "uint8"):
        raise ValueError(f"output must be 'latents' or 'uint8', got {output!r}")
    if output == "uint8" and getattr(model, "vae", None) is None:
        raise ValueError("output='uint8' needs a model that was loaded with a vae")
    if isinstance(model, FlowModel):
        start, fields = _class_conditional(model, plan, labels, guidance, guidance_channels, noise, seed, cond)
    else:
        if labels is not None:
            cond["labels"] = labels
        start, fields = _plain_function(model, plan, guidance, guidance_channels, noise, seed, cond)

    N = len(start)
    size = positive("batch_size", batch_size) if batch_size is not None else N
    done = []
    with tqdm(total=math.ceil(N / size) * len(plan), disable=not progress, unit="step", leave=False) as bar:
        for first in range(0, N, size):
            rows = torch.arange(first, first + size).clamp(max=N - 1)  # the last batch repeats the last image
            count = min(size, N - first)
            with use_backend(model.backend if isinstance(model, FlowModel) else "auto"):
                latents, stopped = _integrate(plan, fields(rows), start[rows], count, first, bar, callback)
            if output == "uint8":
                assert isinstance(model, FlowModel)
                done.append(model.decode(latents)[:count])
            else:
                done.append(latents[:count])
            if stopped:
                break
    return torch.cat(done)


def _integrate(
    plan: Plan, field: Field, x: Tensor, count: int, first: int, bar: Any, callback: Callback | None
) -> tuple[Tensor, bool]:
    """The loop: one batch from noise to latents, and whether the callback ended it."""
    state = State(x)
    for i, (step, t0, t1) in enumerate(plan.schedule()):
        state = step(field, state, t0, t1)
        bar.update()
        if callback is not None:
            v = state.newest_velocity
            assert v is not None
            info = StepInfo(i + 1, len(plan), t1, first, state.x[:count], denoised(state.x, v, t1)[:count])
            if callback(info) is False:
                return state.x, True
    return state.x, False


Fields = Callable[[Tensor], Field]
"""Row numbers of a batch -> its field."""


def _class_conditional(
    model: FlowModel,
    plan: Plan,
    labels: Any,
    guidance: float,
    guidance_channels: int | None,
    noise: Tensor | None,
    seed: int | None,
    cond: dict[str, Any],
) -> tuple[Tensor, Fields]:
    """Check the arguments against the model -> (noise on its device, fields)."""
    if cond:
        raise TypeError(f"sample got unexpected arguments {sorted(cond)}: a FlowModel takes labels only")
    if plan.cost.refiner and model.refiner is None:
        raise ValueError(f"plan {plan} has refiner steps, but the model was loaded without refiner=")
    finite("guidance", guidance)
    if guidance != 1 and model.null_class is None:
        raise ValueError(f"guidance={guidance} needs a model with a null class, and this one has none")
    channels = model.latent_shape[0]
    if guidance_channels is None:
        guidance_channels = model.guidance_channels
    elif not 1 <= positive("guidance_channels", guidance_channels) <= channels:
        raise ValueError(f"guidance_channels must be from 1 to {channels}, got {guidance_channels}")
    if labels is None:
        if noise is None:
            raise ValueError("give labels (class numbers) or, for unconditional images, noise")
        if guidance != 1:
            raise ValueError(f"guidance={guidance} needs labels")
        if model.null_class is None:
            raise ValueError("labels are needed: the model has no null class")
        classes = torch.full((len(noise),), model.null_class)
    else:
        classes = _labels(labels, model.num_classes)
    start = _noise(noise, seed, (len(classes), *model.latent_shape)).to(model.device)
    classes = classes.to(model.device)
    scale = None if guidance == 1 else guidance
    return start, lambda rows: field_of(model, plan, classes[rows], scale, guidance_channels)


def _plain_function(
    function: VelocityFunction,
    plan: Plan,
    guidance: float,
    guidance_channels: int | None,
    noise: Tensor | None,
    seed: int | None,
    cond: dict[str, Any],
) -> tuple[Tensor, Fields]:
    if not callable(function):
        raise TypeError(f"model must be a FlowModel or a callable v(x, t, **cond), got {type(function).__name__}")
    if guidance != 1 or guidance_channels is not None:
        raise ValueError("guidance is not applied to a plain function: guide inside it, or make a FlowModel with a null class")
    if plan.cost.refiner:
        raise ValueError(f"plan {plan} has refiner steps, but a plain function has no refiner")
    if noise is None:
        raise ValueError("a plain function needs noise: the shape of x is not known")
    start = _noise(noise, seed, None)
    N = len(start)

    def pick(value: Any, rows: Tensor) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == N:
            return value[rows.to(value.device)]
        if isinstance(value, list | tuple) and len(value) == N:
            return [value[i] for i in rows.tolist()]
        return value

    return start, lambda rows: FunctionField(function, {k: pick(v, rows) for k, v in cond.items()})


def _labels(labels: Any, num_classes: int) -> Tensor:
    if isinstance(labels, list | tuple | range) and not len(labels):
        raise ValueError("labels must be a list of at least one class number, got an empty one")
    try:
        classes = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"labels must be a class number or a list of them, got {labels!r}") from None
    if classes.dtype == torch.bool or classes.is_floating_point() or classes.is_complex():
        raise TypeError(f"labels must be whole numbers, got {classes.dtype}")
    classes = classes.reshape(1) if classes.ndim == 0 else classes
    if classes.ndim != 1 or not len(classes):
        raise ValueError(f"labels must be a list of at least one class number, got shape {tuple(classes.shape)}")
    bad = [int(c) for c in classes if not 0 <= c < num_classes]
    if bad:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {bad[0]}")
    return classes.to(torch.int64)


def _noise(given: Tensor | None, seed: int | None, shape: tuple[int, ...] | None) -> Tensor:
    if given is None:
        assert shape is not None
        return rng.noise(shape[1:], secrets.randbits(63) if seed is None else seed, range(shape[0]))
    if not isinstance(given, Tensor):
        raise TypeError(f"noise must be a tensor, got {type(given).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"noise must be floating point, got {given.dtype}")
    if shape is not None and tuple(given.shape) != shape:
        raise ValueError(f"noise must have shape {shape} (images, channels, height, width), got {tuple(given.shape)}")
    if given.ndim < 1 or not len(given):
        raise ValueError(f"noise must hold at least one image, got shape {tuple(given.shape)}")
    if not given.isfinite().all():
        raise ValueError("noise must be finite, got NaN or infinity in it")
    return given.to(torch.promote_types(given.dtype, torch.float32))
