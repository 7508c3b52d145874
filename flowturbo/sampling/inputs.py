"""The inputs of a run: checks of labels, prompts and noise."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.flow_model import FlowModel
from ..models.not_finite import Name, image_name
from ..models.text_to_image import PromptModel
from ..runtime import rng
from ..storage.pixels import refuse_pixels, tensor_of
from .enlarge import resized_noise


def inputs_of(
    model: FlowModel,
    labels: Any,
    guidance: float,
    noise: Tensor | None,
    seed: int | None,
    negative: Any = None,
    count: int = 1,
) -> dict[str, Tensor]:
    """Check the arguments against the model -> noise and conditions, on the model's device.

    noise: (N, C, H, W). Conditions: "labels" (N,) int64, or those of prompts.
    count: the number of images that a single label serves.
    Raises ValueError or TypeError, naming the argument, for input that does not fit.
    """
    if isinstance(model, PromptModel):
        if labels is None:
            raise ValueError(
                "labels must be prompts for a text-to-image model: texts, or what encode makes of "
                "them"
            )
        conditions = model.conditions(labels, guidance, negative)
    else:
        conditions = {"labels": _class_numbers(model, labels, guidance, noise).to(model.device)}
    rows = len(next(iter(conditions.values())))
    if rows == 1 != count:
        conditions = {
            name: value.expand(count, *value.shape[1:]) for name, value in conditions.items()
        }
    if noise is None:
        drawn = drawn_seed(seed, None) or 0
        start = noise_of(model, drawn, range(max(rows, count))).to(model.device)
    else:
        shape = (max(rows, count), *model.latent_shape)
        start = starting_noise(noise, seed, shape).to(model.device)
    return {"noise": start, **conditions}


def noise_of(model: FlowModel, seed: int, images: Sequence[int]) -> Tensor:
    """The noise that a seed draws for images of a model, (images, C, H, W) float32, on the CPU."""
    if model.drawn is None:
        return rng.noise(model.latent_shape, seed, images)
    H, W = model.latent_shape[1:]
    return resized_noise(rng.noise(model.drawn, seed, images), (H, W))


def drawn_seed(seed: int | None, noise: Tensor | None) -> int | None:
    """The seed, drawn here if neither seed nor noise is given: so that messages can name it."""
    return secrets.randbits(63) if seed is None and noise is None else seed


def image_names(
    model: FlowModel,
    labels: Any,
    seed: int | None,
    noise: Tensor | None,
    inputs: Mapping[str, Tensor],
) -> Name:
    """Number -> "image 3 (label 7, cat, seed 0)", for messages.

    labels, seed, noise: the caller's. inputs: what `inputs_of` made of them.
    """
    texts = [labels] if isinstance(labels, str) else labels
    prompts = (
        texts if isinstance(texts, Sequence) and all(isinstance(x, str) for x in texts) else []
    )

    def name(i: int) -> str:
        label = prompts[i % len(prompts)] if prompts else None
        class_name = None
        if "labels" in inputs:
            label = int(inputs["labels"][i])
            class_name = model.class_name(label)
        return image_name(i, label, seed if noise is None else None, class_name)

    return name


def _class_numbers(model: FlowModel, labels: Any, guidance: float, noise: Tensor | None) -> Tensor:
    """Class numbers (N,) int64; the null class if there are no labels."""
    if labels is None:
        if noise is None:
            raise ValueError("give labels (class numbers) or, for unconditional images, noise")
        if guidance != 1:
            raise ValueError(f"guidance={guidance} needs labels")
        if model.null_class is None:
            raise ValueError("labels are needed: the model has no null class")
        return torch.full((len(noise),), model.null_class, device="cpu")
    return _labels(model.numbered(labels), model.num_classes)


def _labels(labels: Any, num_classes: int) -> Tensor:
    """Class numbers as (N,) int64, checked."""
    if isinstance(labels, list | tuple | range) and not len(labels):
        raise ValueError("labels must be a list of at least one class number, got an empty one")
    try:
        # torch does not take all of NumPy's numbers in a list.
        scalars = labels if isinstance(labels, list | tuple) else [labels]
        numpys = any(isinstance(label, np.generic) for label in scalars)
        arrays = isinstance(labels, np.ndarray | Tensor)
        given = (
            labels
            if arrays
            else np.asarray(labels)
            if numpys
            else torch.as_tensor(labels, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels must be a class number or a list of them, got {labels!r}"
        ) from None
    classes = tensor_of("labels", given)
    if classes.dtype == torch.bool or classes.is_floating_point():
        raise TypeError(f"labels must be whole numbers, got {classes.dtype}")
    classes = classes.reshape(1) if classes.ndim == 0 else classes
    if classes.ndim != 1 or not len(classes):
        raise ValueError(
            f"labels must be a list of at least one class number, got shape {tuple(classes.shape)}"
        )
    classes = classes.to(torch.int64)
    # One copy to the host: asking a device for each label would wait for it as many times.
    outside = [label for label in classes.tolist() if not 0 <= label < num_classes]
    if outside:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {outside[0]}")
    return classes


def starting_noise(noise: Tensor | None, seed: int | None, shape: tuple[int, ...] | None) -> Tensor:
    """The noise that a run starts from, checked, in float32 or wider.

    noise: (N, ...), or None: drawn from the seed.
    shape: None: any, and of any distribution.
    """
    if noise is None:
        assert shape is not None
        return rng.noise(shape[1:], drawn_seed(seed, None) or 0, range(shape[0]))
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor, got {type(noise).__name__}")
    if not noise.is_floating_point():
        raise TypeError(f"noise must be floating point, got {noise.dtype}")
    if shape is not None and tuple(noise.shape) != shape:
        raise ValueError(
            f"noise must have shape {shape} (images, channels, "
            f"{'frames, ' * (len(shape) == 5)}height, width), got {tuple(noise.shape)}"
        )
    if noise.ndim < 1 or not len(noise):
        raise ValueError(f"noise must hold at least one image, got shape {tuple(noise.shape)}")
    if not noise.isfinite().all():
        raise ValueError("noise must be finite, got NaN or infinity in it")
    if shape is not None:
        refuse_pixels("noise", noise, "draw it from the standard normal distribution")
    return noise.to(torch.promote_types(noise.dtype, torch.float32))
