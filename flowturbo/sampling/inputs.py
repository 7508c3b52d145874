"""Checks of what a sampler is given: labels, noise, guidance."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor

from ..models.flow_model import FlowModel
from ..models.text_to_image import PromptModel
from ..runtime import rng


def inputs_of(
    model: FlowModel,
    labels: Any,
    guidance: float,
    noise: Tensor | None,
    seed: int | None,
    negative: Any = None,
    count: int = 1,
) -> dict[str, Tensor]:
    """Check the arguments against the model -> a job's noise and conditions, on the model's device.
    One label serves `count`.
    """
    if isinstance(model, PromptModel):
        if labels is None:
            raise ValueError(
                "labels must be prompts for a text-to-image model: texts, or what encode makes of "
                "them"
            )
        found = model.conditions(labels, guidance, negative)
    else:
        found = {"labels": _class_numbers(model, labels, guidance, noise).to(model.device)}
    rows = len(next(iter(found.values())))
    if rows == 1 != count:
        found = {name: value.expand(count, *value.shape[1:]) for name, value in found.items()}
    start = _noise(noise, seed, (max(rows, count), *model.latent_shape)).to(model.device)
    return {"noise": start, **found}


def _class_numbers(model: FlowModel, labels: Any, guidance: float, noise: Tensor | None) -> Tensor:
    if labels is None:
        if noise is None:
            raise ValueError("give labels (class numbers) or, for unconditional images, noise")
        if guidance != 1:
            raise ValueError(f"guidance={guidance} needs labels")
        if model.null_class is None:
            raise ValueError("labels are needed: the model has no null class")
        return torch.full((len(noise),), model.null_class)
    return _labels(labels, model.num_classes)


def _labels(labels: Any, num_classes: int) -> Tensor:
    if isinstance(labels, list | tuple | range) and not len(labels):
        raise ValueError("labels must be a list of at least one class number, got an empty one")
    try:
        classes = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels must be a class number or a list of them, got {labels!r}"
        ) from None
    if classes.dtype == torch.bool or classes.is_floating_point() or classes.is_complex():
        raise TypeError(f"labels must be whole numbers, got {classes.dtype}")
    classes = classes.reshape(1) if classes.ndim == 0 else classes
    if classes.ndim != 1 or not len(classes):
        raise ValueError(
            f"labels must be a list of at least one class number, got shape {tuple(classes.shape)}"
        )
    classes = classes.to(torch.int64)
    bad = classes[
        (classes < 0) | (classes >= num_classes)
    ]  # one synchronisation, wherever they lie
    if len(bad):
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {int(bad[0])}")
    return classes


def _noise(given: Tensor | None, seed: int | None, shape: tuple[int, ...] | None) -> Tensor:
    if given is None:
        assert shape is not None
        return rng.noise(shape[1:], secrets.randbits(63) if seed is None else seed, range(shape[0]))
    if not isinstance(given, Tensor):
        raise TypeError(f"noise must be a tensor, got {type(given).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"noise must be floating point, got {given.dtype}")
    if shape is not None and tuple(given.shape) != shape:
        raise ValueError(
            f"noise must have shape {shape} (images, channels, height, width), got "
            f"{tuple(given.shape)}"
        )
    if given.ndim < 1 or not len(given):
        raise ValueError(f"noise must hold at least one image, got shape {tuple(given.shape)}")
    if not given.isfinite().all():
        raise ValueError("noise must be finite, got NaN or infinity in it")
    return given.to(torch.promote_types(given.dtype, torch.float32))
