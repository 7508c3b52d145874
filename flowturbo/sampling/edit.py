"""Editing (SDEdit, arXiv 2108.01073) and inpainting, with the steps of any plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import finite, listed
from ..models.flow_model import FlowModel
from ..models.model_plans import find_unstaged
from ..models.not_finite import NotFiniteError, not_finite_rows
from ..runtime.modes import without_autocast
from ..solver.plan import Plan
from ..storage.pixels import kind_of, refuse_pixels, tensor_of, to_bytes, to_mask
from .batches import ModelBatches, in_batches
from .inputs import drawn_seed, image_names, inputs_of
from .run import Callback, Job

Images = np.ndarray | Tensor
Output = Literal["latents", "uint8"]


@torch.no_grad()
def edit(
    model: FlowModel,
    plan: str | Plan,
    images: Images,
    labels: Any,
    *,
    strength: float = 0.6,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    output: Output = "uint8",
    negative: str | Sequence[str] | None = None,
) -> Tensor:
    """Change images towards labels: mix each with noise, and integrate from there.

    images: (N, height, width, 3) of the model's size, or latents (N, C, H, W), floating point.
        Pixels are uint8, uint16, bool, or floating point from 0 to 1 or from 0 to 255; others are
        rounded to uint8 first. One image serves all labels, and one label all images.
    labels: class numbers or names, or prompts for a text-to-image model.
    strength: above 0, at most 1. Integration starts at t = 1 - strength: a small strength keeps the
        image, 1 ignores it. All steps of the plan run, on its grid compressed into [1 - strength,
        1].
    The other arguments are those of `sample`.
    Returns images (N, height, width, 3) uint8, or latents (N, C, H, W) float32, on the model's
    device.
    Raises ValueError or TypeError, naming the argument, for input that does not fit.
    """
    remaining, seed = _plan_from_strength(model, plan, strength), drawn_seed(seed, noise)
    inputs, job = edit_job(
        model, remaining, images, labels, guidance, guidance_channels, noise, seed, output, negative
    )
    return in_batches(
        ModelBatches(model, job, inputs, guidance, image_names(model, labels, seed, noise, inputs)),
        len(inputs["noise"]),
        remaining,
        batch_size,
        progress,
        callback,
    )


@torch.no_grad()
def inpaint(
    model: FlowModel,
    plan: str | Plan,
    images: Images,
    mask: Images,
    labels: Any,
    *,
    strength: float = 1.0,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    output: Output = "uint8",
    negative: str | Sequence[str] | None = None,
) -> Tensor:
    """Generate the masked part of images anew, and keep the rest.

    To remove an object, mask it and give the label of the background.
    mask: (height, width) or (N, height, width), of the size of the images (or of the latents, if
        images are latents), of the types of pixels, or 0 and 1 of any type: above half of white
        for the part to generate.
    strength: below 1 the masked part is edited rather than generated from noise alone.
    After each step, x outside the mask is set to the source on its path to the noise (paper section
    4.4). So the latents outside are those of the source in the end. A latent is inside the mask if
    any of its pixels is. Outside the mask, images keep the pixels of the source. Arguments, results
    and errors are otherwise those of `edit`. ValueError also for a mask of another size, and for an
    empty one.
    """
    remaining, seed = _plan_from_strength(model, plan, strength), drawn_seed(seed, noise)
    inputs, job = edit_job(
        model, remaining, images, labels, guidance, guidance_channels, noise, seed, output, negative
    )
    N, (H, W) = len(inputs["noise"]), model.latent_shape[1:]
    pixels = _pixels_or_latents(model, images)
    size = (H, W) if pixels.is_floating_point() else tuple(pixels.shape[1:3])
    masked = _mask(mask, N, size).to(model.device)
    inputs["mask"] = F.max_pool2d(masked[:, None].float(), (size[0] // H, size[1] // W)) > 0
    generated = in_batches(
        ModelBatches(model, job, inputs, guidance, image_names(model, labels, seed, noise, inputs)),
        N,
        remaining,
        batch_size,
        progress,
        callback,
    )
    if output == "latents" or pixels.is_floating_point():
        return generated
    return torch.where(
        masked[: len(generated), ..., None],
        generated,
        pixels.to(generated.device).expand(N, -1, -1, -1)[: len(generated)],
    )


def _plan_from_strength(model: FlowModel, plan: str | Plan, strength: float) -> Plan:
    """The plan on the part of the time grid that strength leaves."""
    if not isinstance(model, FlowModel):
        raise TypeError(f"model must be a FlowModel, got {type(model).__name__}")
    if not 0 < finite("strength", strength) <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    return find_unstaged(plan, model.plans, model.shift).starting_at(1 - strength)


def edit_job(
    model: FlowModel,
    plan: Plan,
    images: Images,
    labels: Any,
    guidance: float,
    guidance_channels: int | None,
    noise: Tensor | None,
    seed: int | None,
    output: str,
    negative: Any = None,
) -> tuple[dict[str, Tensor], Job]:
    """Check the arguments -> (the inputs of a job, for all images; the job).

    The inputs are noise and source, (N, C, H, W) float32, and the conditions.
    """
    job = Job.of(model, plan, guidance, guidance_channels, output, torch.float32)
    if len(model.latent_shape) != 3:
        raise ValueError("model must make images: videos can be neither edited nor inpainted")
    source = _source(model, images)
    if labels is None:
        raise ValueError("labels must say what to make: a class or prompt, or one an image")
    inputs = inputs_of(model, labels, guidance, noise, seed, negative, len(source))
    count = len(inputs["noise"])
    for name, number in (
        ("images", len(source)),
        ("labels", len(next(v for k, v in inputs.items() if k != "noise"))),
    ):
        if number not in (1, count):
            raise ValueError(
                f"{name} must be one or as many as there are of the other ({count}), got {number}"
            )
    return {
        **inputs,
        "noise": inputs["noise"].float(),
        "source": source.expand(count, -1, -1, -1),
    }, job


def _source(model: FlowModel, images: Images) -> Tensor:
    """Latents (N, C, H, W) float32 of images, on the model's device."""
    given = _pixels_or_latents(model, images)
    if given.is_floating_point():
        return given.to(model.device, torch.float32)
    assert model.vae is not None
    with without_autocast(model.device):
        encoded = model.vae.encode(given.to(model.device))[0].to(model.device, torch.float32)
    if broken := not_finite_rows(encoded):
        raise NotFiniteError(
            f"images {listed(broken)} have latents with NaN or infinity: the vae "
            "overflows, as some do in float16, or has weights that are not finite"
        )
    return encoded


def _pixels_or_latents(model: FlowModel, images: Images) -> Tensor:
    """Images, checked: pixels (N, height, width, 3) uint8, or latents (N, C, H, W).

    Floating point is taken for latents unless its shape is that of pixels.
    """
    given = tensor_of("images", images)
    shape = tuple(given.shape)
    if shape[1:] == model.latent_shape and given.is_floating_point() and len(given):
        if not given.isfinite().all():
            raise ValueError("images must be finite, got NaN or infinity in them")
        refuse_pixels("images given as latents", given, "give pixels as (N, height, width, 3)")
        return given
    if given.ndim != 4 or shape[-1] != 3 or not len(given):
        latents = f", or as latents (N, {_shape(model)}) in floating point"
        raise ValueError(
            f"images must have shape (N, height, width, 3){latents}, got {kind_of(images)} of "
            f"{shape}"
        )
    height, width = image_size(model)
    if shape[1:3] != (height, width):
        raise ValueError(
            f"images must be {height} x {width} for this model, got {shape[1]} x {shape[2]}"
        )
    return to_bytes("images", given, kind_of(images))


def image_size(model: FlowModel) -> tuple[int, int]:
    """(height, width) in pixels. ValueError for a model without a vae."""
    if model.vae is None:
        raise ValueError("images need a model that was loaded with a vae; latents do not")
    height, width = (side * model.vae.factor for side in model.latent_shape[1:])
    return height, width


def _shape(model: FlowModel) -> str:
    return ", ".join(map(str, model.latent_shape))


def _mask(mask: Images, count: int, size: tuple[int, ...]) -> Tensor:
    """The mask as (count, height, width) bool, checked."""
    given = tensor_of("mask", mask)
    rows = given[None] if given.ndim == 2 else given
    if rows.ndim != 3 or tuple(rows.shape[1:]) != size or len(rows) not in (1, count):
        raise ValueError(
            f"mask must have the images' size, shape {size} or {(count, *size)}, got "
            f"{tuple(given.shape)}"
        )
    masked = to_mask("mask", rows, kind_of(mask))
    if not masked.flatten(1).any(dim=1).all():
        raise ValueError(
            "mask must choose at least one pixel of every image, got one that chooses nothing"
        )
    return masked.expand(count, -1, -1)
