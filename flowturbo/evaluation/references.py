"""What sampled pictures are compared with: the training set's pictures, and held-out ones."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from ..data.latents import Data, Latents, load_data
from ..models.flow_model import FlowModel
from .class_shares import matched, proportional_labels
from .kernel_distance import kernel_distances, leave_one_out
from .metrics import frechet_distance
from .nearest import Nearest
from .picture_classifier import PictureClassifier, kept_classifier
from .quality_settings import Evaluate
from .statistics import BLOCKS, without_blocks

QUANTILES = (0.01, 0.05, 0.5)
"""Of the distance to the nearest training picture."""


def pictures(name: str, source: str, model: FlowModel) -> Latents:
    """The pictures of a source, if they are the model's; ValueError, naming the setting, if not."""
    data: Data = load_data(source)
    if not isinstance(data, Latents) or data.std is not None:
        raise ValueError(f"{name} must be pixels in an .npz or in shards, got {source!r}")
    if data.shape != model.latent_shape or data.num_classes > model.num_classes:
        raise ValueError(
            f"{name} must be of the model's form, {model.latent_shape} of {model.num_classes} "
            f"classes, got {data.shape} of {data.num_classes}"
        )
    if float(most := data.mean.abs().max()) > 1.001:
        raise ValueError(f"{name} must be pixels in [-1, 1], got values up to {float(most):.4g}")
    return data


class References:
    """Training and held-out pictures with their features, and the labels of samples."""

    def __init__(self, settings: Evaluate, data: Latents, held: Latents | None) -> None:
        self.data, self.held = data, held
        self.labels = proportional_labels(data.labels, data.num_classes, settings.count)
        self.classifier: PictureClassifier = kept_classifier(
            settings.out / "classifier.safetensors", data, settings.steps
        )
        self.nearest = Nearest(data)
        self.features = self.classifier.read(data.mean)[0]
        self.held_features = None if held is None else self.classifier.read(held.mean)[0]
        self.held_nearest = None if held is None else self.nearest(held.mean)

    def summary(self) -> dict[str, Any]:
        """Figures of the classifier and of the two sets themselves, for the report."""
        found: dict[str, Any] = {"training_images": len(self.data), "held_out_images": 0}
        if self.held is None or self.held_nearest is None:
            return found
        right = self.classifier.read(self.held.mean)[1] == self.held.labels
        by_class = [float(right[self.held.labels == c].double().mean()) for c in self._classes()]
        return found | {
            "held_out_images": len(self.held),
            "held_out_accuracy": float(right.double().mean()),
            "held_out_accuracy_by_class": statistics.fmean(by_class),
            "held_out_nearest": quantiles(self.held_nearest),
            "training_to_held_out": self._to_held_out(self.features, self.data.labels),
        }

    def _classes(self) -> list[int]:
        return [] if self.held is None else self.held.labels.unique().tolist()

    def figures(self, features: Tensor, classes: Tensor, nearest: Tensor) -> dict[str, Any]:
        """The figures of samples with the labels `self.labels`.

        features (N, F); classes (N,), the classifier's; nearest (N,), RMS to the nearest training
        picture. "<measure>_blocks" are jackknife values over blocks of samples,
        "<measure>_reference_blocks" over blocks of the pictures that they are compared with.
        """
        right = (classes == self.labels).double()
        found = {
            **compared(features, self.features),
            **self._to_held_out(features, self.labels),
            "label_share": float(right.mean()),
            "label_share_blocks": [
                float(right[kept].mean()) for kept in without_blocks(len(right))
            ],
            "nearest": quantiles(nearest),
        }
        if self.held is not None and self.held_nearest is not None:
            near = self.held_nearest.quantile(0.05)
            rows, _ = matched(self.labels, self.held.labels)
            found["nearer_share"] = float((nearest[rows] < near).double().mean())
        return found

    def _to_held_out(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """Distances to the held-out pictures, of samples in their class shares.

        Nothing without held-out pictures, or if too few samples have their classes.
        """
        if self.held is None or self.held_features is None:
            return {}
        held, held_labels = self.held_features, self.held.labels
        rows, others = matched(labels, held_labels)
        if min(len(rows), len(others)) < 2 * BLOCKS:
            return {}
        found = compared(features[rows], held[others])
        found |= {"frechet_reference_blocks": [], "kid_reference_blocks": []}
        for kept in without_blocks(len(others)):
            fewer = others[kept]
            rows, there = matched(labels, held_labels[fewer])
            a, b = features[rows], held[fewer[there]]
            found["frechet_reference_blocks"].append(frechet_distance(a, b))
            found["kid_reference_blocks"].append(statistics.fmean(kernel_distances(a, b)))
        return {
            name.replace("frechet", "frechet_held").replace("kid", "kid_held"): value
            for name, value in found.items()
        } | {"held_samples": len(rows)}


def compared(features: Tensor, reference: Tensor) -> dict[str, Any]:
    """The Fréchet and the kernel distance of features to a reference's, with jackknife values."""
    kernel = kernel_distances(features, reference)
    return {
        "frechet": frechet_distance(features, reference),
        "frechet_blocks": [
            frechet_distance(features[kept], reference) for kept in without_blocks(len(features))
        ],
        "kid": statistics.fmean(kernel),
        "kid_blocks": leave_one_out(kernel),
    }


def quantiles(values: Tensor) -> dict[str, float]:
    """{"0.01": ..., "0.05": ..., "0.5": ...} of values (N,)."""
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    found = values.double().quantile(levels).tolist()
    return {f"{level:g}": value for level, value in zip(QUANTILES, found, strict=True)}


def read_pictures(settings: Evaluate, model: FlowModel) -> tuple[Latents, Latents | None]:
    """The training set and the held-out pictures; ValueError if they are not the model's."""
    data = pictures("data", str(settings.data), model)
    if settings.held_out is None:
        return data, None
    held = pictures("held_out", settings.held_out, model)
    counts = data.labels.bincount(minlength=max(data.num_classes, held.num_classes))
    if missing := [c for c in held.labels.unique().tolist() if not counts[c]]:
        raise ValueError(f"held_out has classes that data lacks: {', '.join(map(str, missing))}")
    return data, held
