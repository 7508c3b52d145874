"""`flowturbo fid`: FID, sFID, inception score, precision and recall by ADM's protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.digests import model_digests
from ..models.flow_model import FlowModel
from ..models.load import load
from ..models.model_plans import find_unstaged
from ..runtime.device import choose_device
from ..storage.files import write_json, write_text
from ..storage.provenance import environment
from ..storage.resume import resumed_report
from .fid_report import fidelity_table
from .fid_settings import Fidelity
from .image_sets import GeneratedImages, ImageSet, Reference, open_images
from .inception import FeatureNetwork, Features, Inception, stored_features
from .metrics import Gaussian, inception_score, precision_recall

FORMAT = 1
SPLIT = 5000
"""Images per split of the inception score, as in ADM's evaluator."""
NEIGHBOURS = 3
"""Rank of the neighbour that sets the radius in precision and recall, as in ADM's evaluator."""


def fidelity(settings: Fidelity, network: FeatureNetwork | None = None) -> Path:
    """Score every plan, or the samples; returns the path of the table, report.md.

    network: whose features are compared; by default Inception's, as in published scores.
    ValueError for settings that do not fit the files or earlier results, CheckpointError for
    damaged files and missing weights.
    """
    device = choose_device(settings.device)
    reference = None if settings.reference is None else Reference(settings.reference)
    _check_reference(settings, reference)
    model = None if settings.model is None else _model(settings)
    sets = _samples(settings, model)
    _check_counts(settings, reference, sets)
    network = network or Inception(settings.inception, device)
    _check_widths(network, reference)
    path = settings.out / "report.json"
    identity = _identity(settings, model, network, reference, sets, device)
    files = {name: str(file) for name in _FILES if (file := getattr(settings, name)) is not None}
    results = resumed_report(path, identity, {"files": files, "rows": []}, "an evaluation")
    results["files"] = files  # paths may have changed: only the digests are compared
    write_json(path, results)
    rows = {row["samples"]: row for row in results["rows"]}
    for name, images in sets.items():
        row = rows.setdefault(name, {"samples": name, "images": len(images)})
        missing = [metric for metric in settings.metrics if metric not in row]
        if missing:
            row |= _scores(settings, results, reference, name, images, network, device, missing)
            results["rows"] = list(rows.values())
            write_json(path, results)
    write_text(settings.out / "report.md", fidelity_table(results))
    return settings.out / "report.md"


def _check_reference(settings: Fidelity, reference: Reference | None) -> None:
    """ValueError if the reference holds only Gaussians and a metric needs its images."""
    if reference is None or reference.images is not None:
        return
    has = {"fid": reference.pool is not None, "sfid": reference.spatial is not None, "is": True}
    metrics = [metric for metric in settings.metrics if not has.get(metric, False)]
    if metrics:
        raise ValueError(
            f"reference {settings.reference} has no arr_0, the images that {', '.join(metrics)} "
            "need"
        )


def _check_counts(
    settings: Fidelity, reference: Reference | None, sets: Mapping[str, ImageSet]
) -> None:
    least = NEIGHBOURS + 1 if {"precision", "recall"} & set(settings.metrics) else 2
    compared = dict(sets)
    if (
        reference is not None
        and reference.images is not None
        and _needs_images(reference, settings.metrics)
    ):
        compared["reference"] = reference.images
    for name, images in compared.items():
        if len(images) < least:
            raise ValueError(
                f"{', '.join(settings.metrics)} need at least {least} images, but {name} has "
                f"{len(images)}"
            )


def _check_widths(network: FeatureNetwork, reference: Reference | None) -> None:
    gaussians = () if reference is None else (("mu", reference.pool), ("mu_s", reference.spatial))
    for (name, gaussian), width in zip(gaussians, network.description["widths"], strict=False):
        if gaussian is not None and len(gaussian.mean) != width:
            raise ValueError(
                f"reference has {name} of {len(gaussian.mean)} features, but the network gives "
                f"{width}"
            )


def _model(settings: Fidelity) -> FlowModel:
    assert settings.model is not None
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    model = load(
        settings.model, settings.refiner, settings.vae, device=settings.device, dtype=dtype
    )
    if model.vae is None:
        raise ValueError(
            "vae must be given: images are scored, and the model's file names no VAE to decode "
            "its latents"
        )
    refined = [plan for plan in settings.plans if find_unstaged(plan, model.plans).cost.refiner]
    if refined and model.refiner is None:
        raise ValueError(f"refiner must be given: of the plans, {', '.join(refined)} need one")
    return model


def _samples(settings: Fidelity, model: FlowModel | None) -> dict[str, ImageSet]:
    """The sets to score, by the names of their rows in the report."""
    if model is not None:
        count = 50_000 if settings.images is None else settings.images
        plans = (find_unstaged(plan, model.plans) for plan in settings.plans)
        options = (
            count,
            settings.scale,
            settings.guidance_channels,
            settings.seed,
            settings.batch_size,
        )
        return {plan.name: GeneratedImages(model, plan, *options) for plan in plans}
    assert settings.samples is not None
    images = open_images(settings.samples, "samples")
    if settings.images is not None and settings.images > len(images):
        raise ValueError(
            f"images must be at most the {len(images)} of {settings.samples}, got {settings.images}"
        )
    return {"samples": images if settings.images is None else _First(images, settings.images)}


class _First:
    """The first `count` images of a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.images, self.count = images, count

    @property
    def description(self) -> dict[str, Any]:
        return {**self.images.description, "first": self.count}

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, count: int) -> np.ndarray:
        return self.images.read(first, min(count, self.count - first))


_FILES = ("samples", "model", "refiner", "vae", "reference", "inception")


def _identity(
    settings: Fidelity,
    model: FlowModel | None,
    network: FeatureNetwork,
    reference: Reference | None,
    sets: Mapping[str, ImageSet],
    device: torch.device,
) -> dict[str, Any]:
    """What the scores depend on."""
    identity: dict[str, Any] = {
        "format": FORMAT,
        "settings": {"batch_size": settings.batch_size},
        "samples": _sample_provenance(settings, model, sets),
        "reference": {} if reference is None else dict(reference.description),
        "network": dict(network.description),
        "environment": environment(device, model.dtype if model else torch.float32),
        "protocol": {"split": SPLIT, "neighbours": NEIGHBOURS},
    }
    if device.type != "cpu":
        del identity["environment"]["threads"]  # results do not depend on CPU threads there
    return identity


def _sample_provenance(
    settings: Fidelity, model: FlowModel | None, sets: Mapping[str, ImageSet]
) -> dict[str, Any]:
    """What the samples are, with all that is needed to reproduce them but the plans.

    A resumed run may add plans, so these are named in the rows.
    """
    if model is None:
        return dict(next(iter(sets.values())).description)
    guidance_channels = (
        model.guidance_channels
        if settings.guidance_channels is None
        else settings.guidance_channels
    )
    return {
        "kind": "made by the model",
        "images": len(next(iter(sets.values()))),
        **model_digests(str(settings.model), settings.refiner),
        "vae": settings.vae or "the one that the predictor's file names",
        "latent_shape": list(model.latent_shape),
        "guidance": settings.scale,
        "guidance_channels": guidance_channels,
        "seed": settings.seed,
        "seed_rule": "noise of image i: flowturbo.noise(latent_shape, seed, [i])",
        "label_rule": f"class of image i: i % {model.num_classes}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounding": "127.5 x + 128, cut off, to uint8",
    }


class Compared(NamedTuple):
    """The inputs of a metric.

    reference: its features, or None if no metric needs its images.
    gaussians: those of the reference's pool and spatial features that its file holds.
    """

    samples: Features
    reference: Features | None
    gaussians: tuple[Gaussian | None, Gaussian | None]
    network: FeatureNetwork
    device: torch.device


def _fid(compared: Compared) -> dict[str, float]:
    return {"fid": _frechet(compared, 0)}


def _sfid(compared: Compared) -> dict[str, float]:
    return {"sfid": _frechet(compared, 1)}


def _frechet(compared: Compared, which: int) -> float:
    target = compared.gaussians[which]
    if target is None:
        assert compared.reference is not None
        target = Gaussian.of(compared.reference[which])
    return Gaussian.of(compared.samples[which]).distance(target)


def _inception_score(compared: Compared) -> dict[str, float]:
    mean, deviation = inception_score(compared.network.logits(compared.samples.pool), SPLIT)
    return {"is": mean, "is_std": deviation}


def _precision_recall(compared: Compared) -> dict[str, float]:
    assert compared.reference is not None
    precision, recall = precision_recall(
        compared.reference.pool, compared.samples.pool, NEIGHBOURS, compared.device
    )
    return {"precision": precision, "recall": recall}


METRICS: dict[str, Callable[[Compared], dict[str, float]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "is": _inception_score,
    "precision": _precision_recall,
    "recall": _precision_recall,
}
"""The function that computes each metric; precision and recall come together."""


def _scores(
    settings: Fidelity,
    results: Mapping[str, Any],
    reference: Reference | None,
    name: str,
    images: ImageSet,
    network: FeatureNetwork,
    device: torch.device,
    metrics: Sequence[str],
) -> dict[str, float]:
    """The metrics of one set of images. name: of its row in the report."""
    shared = {k: results[k] for k in ("network", "environment", "settings")}
    folder = settings.out / "features"
    reference_features = None
    if reference is not None and _needs_images(reference, metrics):
        assert reference.images is not None
        identity = {"reference": results["reference"], **shared}
        reference_features = stored_features(
            reference.images, network, folder / "reference", identity, settings.batch_size
        )
    identity = {"samples": results["samples"], **shared, "name": name}
    features = stored_features(images, network, folder / name, identity, settings.batch_size)
    gaussians = (None, None) if reference is None else (reference.pool, reference.spatial)
    # Precision and recall need float64, which devices other than CUDA may lack.
    device = device if device.type == "cuda" else torch.device("cpu")
    compared = Compared(features, reference_features, gaussians, network, device)
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric not in scores:
            scores |= METRICS[metric](compared)
    return scores


def _needs_images(reference: Reference, metrics: Sequence[str]) -> bool:
    """Whether a metric needs the reference's images, not just the Gaussians in its file."""
    without_images = (
        {"is"} | ({"fid"} if reference.pool else set()) | ({"sfid"} if reference.spatial else set())
    )
    return not set(metrics) <= without_images
