"""Editing and inpainting by a flow model (SDEdit, arXiv 2108.01073): a plan's steps from a source
image on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import finite
from ..models.flow_model import FlowModel
from ..solver.plan import Plan, as_plan
from .inputs import inputs_of
from .run import Callback, Job
from .sampler import ModelBatches, in_batches

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

    images: (N, height, width, 3) uint8, of the model's size, or latents (N, C, H, W) floating
        point; one image serves all labels, and one label all images.
    labels: class numbers, or prompts for a text-to-image model; negative: as in `sample`.
    strength: above 0, at most 1. The integration starts at t = 1 - strength: small keeps the image,
        1 forgets it. All of the plan's steps run, on its grid squeezed into [1 - strength, 1].
    The rest is as in `sample`. Returns images (N, height, width, 3) uint8, or latents (N, C, H, W)
    float32. Raises ValueError or TypeError, naming the argument, for input that does not fit.
    """
    begun = _begun(model, plan, strength)
    inputs, job = edit_job(
        model, begun, images, labels, guidance, guidance_channels, noise, seed, output, negative
    )
    return in_batches(
        ModelBatches(model, job, inputs, guidance),
        len(inputs["noise"]),
        begun,
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
    """Make the masked part of images anew, and keep the rest; an object is removed by its mask and
    the label of what lies behind.

    mask: (height, width) or (N, height, width), of the images' size (or of the latents', if latents
        are given): bool, or floating point or uint8, of which what is above half is to be made anew
        (of 255, or of 1 where nothing is larger).
    strength: below 1 the masked part is edited instead of made from noise alone.
    After every step, x outside the mask is the source on its path to the noise that was drawn
    (paper section 4.4), so that latents outside are the source's own in the end; a latent is inside
    as soon as one of its pixels is. Images are those latents decoded, with the source's own pixels
    outside the mask. The rest is as in `edit`. ValueError also for a mask of another size, and for
    one that covers nothing.
    """
    begun = _begun(model, plan, strength)
    inputs, job = edit_job(
        model, begun, images, labels, guidance, guidance_channels, noise, seed, output, negative
    )
    N, (H, W) = len(inputs["noise"]), model.latent_shape[1:]
    pixels = torch.as_tensor(images)
    size = (H, W) if pixels.is_floating_point() else tuple(pixels.shape[1:3])
    chosen = _mask(mask, N, size).to(model.device)
    inputs["mask"] = F.max_pool2d(chosen[:, None].float(), (size[0] // H, size[1] // W)) > 0
    made = in_batches(
        ModelBatches(model, job, inputs, guidance), N, begun, batch_size, progress, callback
    )
    if output == "latents" or pixels.is_floating_point():
        return made
    return torch.where(
        chosen[: len(made), ..., None],
        made,
        pixels.to(made.device).expand(N, -1, -1, -1)[: len(made)],
    )


def _begun(model: FlowModel, plan: str | Plan, strength: float) -> Plan:
    """The plan, on the model's own grid where it is text, squeezed into what strength leaves of the
    way.
    """
    if not isinstance(model, FlowModel):
        raise TypeError(f"model must be a FlowModel, got {type(model).__name__}")
    if not 0 < finite("strength", strength) <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    return as_plan(plan, model.shift).starting_at(1 - strength)


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
    """Check the arguments -> (inputs of a job for all images, the job)."""
    job = Job.of(model, plan, guidance, guidance_channels, output, torch.float32)
    source = _source(model, images)
    if labels is None:
        raise ValueError("labels must say what to make: a class number or prompt, or one an image")
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
    if not isinstance(images, np.ndarray | Tensor):
        raise TypeError(f"images must be an array or a tensor, got {type(images).__name__}")
    given = torch.as_tensor(images)
    if given.is_floating_point():
        if given.ndim != 4 or tuple(given.shape[1:]) != model.latent_shape or not len(given):
            raise ValueError(
                f"images given as latents must have shape (N, {_shape(model)}), got "
                f"{tuple(given.shape)}"
            )
        if not given.isfinite().all():
            raise ValueError("images must be finite, got NaN or infinity in them")
        return given.to(model.device, torch.float32)
    if given.dtype != torch.uint8 or given.ndim != 4 or given.shape[-1] != 3 or not len(given):
        raise ValueError(
            f"images must be uint8 of shape (N, height, width, 3), got {given.dtype} of "
            f"{tuple(given.shape)}"
        )
    height, width = image_size(model)
    assert model.vae is not None
    if tuple(given.shape[1:3]) != (height, width):
        raise ValueError(
            f"images must be {height} x {width} for this model, got {given.shape[1]} x "
            f"{given.shape[2]}"
        )
    return model.vae.encode(given.to(model.device))[0].to(model.device, torch.float32)


def image_size(model: FlowModel) -> tuple[int, int]:
    """(height, width) in pixels. ValueError without a vae."""
    if model.vae is None:
        raise ValueError("images need a model that was loaded with a vae; latents do not")
    height, width = (side * model.vae.factor for side in model.latent_shape[1:])
    return height, width


def _shape(model: FlowModel) -> str:
    return ", ".join(map(str, model.latent_shape))


def _mask(mask: Images, count: int, size: tuple[int, ...]) -> Tensor:
    """-> (count, height, width) bool: what is to be made anew."""
    if not isinstance(mask, np.ndarray | Tensor):
        raise TypeError(f"mask must be an array or a tensor, got {type(mask).__name__}")
    given = torch.as_tensor(mask)
    given = given[None] if given.ndim == 2 else given
    if given.ndim != 3 or tuple(given.shape[1:]) != size or len(given) not in (1, count):
        raise ValueError(
            f"mask must have the images' size, shape {size} or {(count, *size)}, got "
            f"{tuple(torch.as_tensor(mask).shape)}"
        )
    if given.is_floating_point():
        given = given > 0.5
    elif given.dtype == torch.uint8:
        given = given > (127 if given.max() > 1 else 0)
    elif given.dtype != torch.bool:
        raise TypeError(f"mask must be bool, uint8 or floating point, got {given.dtype}")
    if not given.flatten(1).any(dim=1).all():
        raise ValueError(
            "mask must choose at least one pixel of every image, got one that chooses nothing"
        )
    return given.expand(count, -1, -1)
