"""What sampled pictures are compared with: the training set's pictures, and held-out ones."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.latents import Data, Latents, load_data
from ..models.class_names import usable_names
from ..models.flow_model import FlowModel
from .class_shares import common_shares, proportional_labels, share_weights, shares_of
from .kernel_distance import Grouped, kernel_distances
from .metrics import weighted_frechet
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
    _check_names(name, data, "the model", model.class_names)
    if float(most := data.mean.abs().max()) > 1.001:
        raise ValueError(f"{name} must be pixels in [-1, 1], got values up to {float(most):.4g}")
    return data


def _check_names(name: str, data: Latents, whose: str, known: Sequence[str] | None) -> None:
    """ValueError if a label is called otherwise elsewhere; names such as "7" say nothing."""
    own = usable_names(data.class_names, data.num_classes)
    for number, (ours, theirs) in enumerate(zip(own or (), known or (), strict=False)):
        if ours != theirs:
            raise ValueError(
                f"{name} must have the classes of {whose}, where class {number} is {theirs!r}, "
                f"got {ours!r}"
            )


class References:
    """Training and held-out pictures with their features, and the labels of samples."""

    def __init__(self, settings: Evaluate, data: Latents, held: Latents | None) -> None:
        self.data, self.held = data, held
        self.shares = shares_of(data.labels, data.num_classes)
        self.labels = proportional_labels(self.shares, settings.count)
        counts = data.labels.bincount(minlength=data.num_classes)
        for kept in without_blocks(settings.count):
            samples = self.labels[kept].bincount(minlength=data.num_classes)
            if not common_shares(self.shares, samples, counts).any():
                raise ValueError(
                    f"images must be enough for several of a class, got {settings.images} for "
                    f"{data.num_classes} classes of {len(data)} pictures"
                )
        self.classifier: PictureClassifier = kept_classifier(
            settings.out / "classifier.safetensors", data, settings.steps
        )
        self.nearest = Nearest(data)
        # One block: the training set is what is aimed at, not a sample of it.
        self.training = self._grouped(data, 1)
        self.held_out = None if held is None else self._grouped(held, BLOCKS)
        self.held_nearest = None if held is None else self.nearest(held.mean)

    def _grouped(self, data: Latents, blocks: int) -> Grouped:
        """Pictures of one class may stand together in a file, so every tenth makes a block."""
        rows = torch.cat([torch.arange(i, len(data), blocks, device="cpu") for i in range(blocks)])
        features = self.classifier.read(data.mean[rows])[0]
        return Grouped(features, data.labels[rows], len(self.shares), blocks)

    def summary(self) -> dict[str, Any]:
        """Figures of the classifier and of the two sets themselves, for the report."""
        found: dict[str, Any] = {
            "training_images": len(self.data),
            "training_classes": int((self.shares > 0).sum()),
            "held_out_images": 0,
        }
        if self.held is None or self.held_nearest is None:
            return found
        right = self.classifier.read(self.held.mean)[1] == self.held.labels
        classes = self.held.labels.unique().tolist()
        by_class = [float(right[self.held.labels == c].double().mean()) for c in classes]
        return found | {
            "held_out_images": len(self.held),
            "held_out_accuracy": float(right.double().mean()),
            "held_out_accuracy_by_class": statistics.fmean(by_class),
            "held_out_nearest": quantiles(self.held_nearest),
            "training_to_held_out": self._to_held_out(self._grouped(self.data, BLOCKS)),
        }

    def figures(self, features: Tensor, classes: Tensor, nearest: Tensor) -> dict[str, Any]:
        """The figures of samples with the labels `self.labels`.

        features (N, F); classes (N,), the classifier's; nearest (N,), RMS to the nearest training
        picture. "<measure>_blocks" are jackknife values over blocks of samples,
        "<measure>_reference_blocks" over blocks of the pictures that they are compared with.
        """
        samples = Grouped(features, self.labels, len(self.shares))
        right = (classes == self.labels).double()
        found = compared(samples, self.training, self.shares)
        found |= self._to_held_out(samples)
        found |= {
            "label_share": float(right.mean()),
            "label_share_blocks": [
                float(right[kept].mean()) for kept in without_blocks(len(right))
            ],
            "nearest": quantiles(nearest),
        }
        if self.held is not None and self.held_nearest is not None:
            near = nearest < self.held_nearest.quantile(0.05)
            shares = shares_of(self.held.labels, len(self.shares))
            weights = share_weights(self.labels, shares)
            found["nearer_share"] = float(weights @ near.double() / weights.sum())
        return found

    def _to_held_out(self, samples: Grouped) -> dict[str, Any]:
        """Distances to the held-out pictures; nothing if there are none or too few of a class."""
        if self.held_out is None:
            return {}
        found = compared(samples, self.held_out, self.shares)
        return {
            re.sub("^(frechet|kid|classes)", r"\1_held", name): value
            for name, value in found.items()
        }


def compared(a: Grouped, b: Grouped, shares: Tensor) -> dict[str, Any]:
    """The Fréchet and the kernel distance of two sets in the same class shares, with jackknife
    values; "classes" is how many have enough pictures in both. Nothing if there are none.
    """
    kept_a, kept_b = a.without(), b.without()
    if not _comparable(a, b, shares):
        return {}

    def frechet(keep_a: Tensor, keep_b: Tensor) -> float:
        p = common_shares(shares, keep_a @ a.counts, keep_b @ b.counts)
        moments = []
        for side, keep in ((a, keep_a), (b, keep_b)):
            rows = (keep[side.block] > 0) & (p[side.labels] > 0)
            moments += [side.features[rows], share_weights(side.labels[rows], p)]
        return weighted_frechet(*moments)

    kernel = kernel_distances(a, b, shares)
    found = {
        "classes": int(common_shares(shares, a.counts.sum(0), b.counts.sum(0)).count_nonzero()),
        "frechet": frechet(kept_a[0], kept_b[0]),
        "frechet_blocks": [frechet(keep, kept_b[0]) for keep in kept_a[1:]],
        "frechet_reference_blocks": [frechet(kept_a[0], keep) for keep in kept_b[1:]],
        "kid": kernel.value,
        "kid_blocks": kernel.blocks,
        "kid_reference_blocks": kernel.reference_blocks,
    }
    return {name: value for name, value in found.items() if value != []}


def _comparable(a: Grouped, b: Grouped, shares: Tensor) -> bool:
    """Whether two sets have a class in common, whichever block is left out."""
    counts = [
        *((keep @ a.counts, b.counts.sum(0)) for keep in a.without()),
        *((a.counts.sum(0), keep @ b.counts) for keep in b.without()),
    ]
    return all(bool(common_shares(shares, *pair).any()) for pair in counts)


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
    _check_names("held_out", held, "data", usable_names(data.class_names, data.num_classes))
    counts = data.labels.bincount(minlength=max(data.num_classes, held.num_classes))
    if missing := [c for c in held.labels.unique().tolist() if not counts[c]]:
        raise ValueError(f"held_out has classes that data lacks: {', '.join(map(str, missing))}")
    return data, held
