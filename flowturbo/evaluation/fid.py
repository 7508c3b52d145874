"""Images scored as published ImageNet figures are: FID, sFID, inception score, precision and recall
by ADM's protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..checks import finite, natural, positive
from ..models.flow_model import FlowModel
from ..models.load import load, model_digests
from ..runtime.device import choose_device
from ..solver.plan import as_plan
from ..storage.files import write_text
from ..storage.provenance import environment
from ..storage.resume import resumed_report
from .fid_report import TITLES, fidelity_table
from .image_sets import GeneratedImages, ImageSet, Reference, open_images
from .inception import FeatureNetwork, Features, Inception, stored_features
from .metrics import Gaussian, inception_score, precision_recall

FORMAT = 1
SPLIT = 5000
"""Images of one inception score, over which ADM's evaluator takes the mean."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class Fidelity:
    """Score images by FID and its kin, as ADM's evaluator does: an .npz or a folder of samples, or
    what a model makes by plans.

    With --samples, the images of a file or folder. With --model, each of the plans makes --images
    of them as they are scored. A folder of results made with the same settings is gone on with;
    metrics and plans may be added.
    """

    metrics: tuple[str, ...]
    """Any of fid, sfid, is, precision, recall, with commas or spaces between them."""
    reference: Path | None = None
    """An .npz in ADM's layout, such as VIRTUAL_imagenet256_labeled.npz, or a folder of images; all
    but "is" need one.
    """
    samples: Path | None = None
    """An .npz with arr_0 (N, height, width, 3) uint8, a folder of such files as sample writes it,
    or a folder of images.
    """
    out: Path = Path("fidelity")
    """Folder for report.md, report.json, and the features of all images."""
    inception: Path | None = None
    """Inception's weights; left out: FLOWTURBO_INCEPTION, else the file in ~/.cache/flowturbo."""
    images: int | None = None
    """How many samples, the first; left out: all there are, or 50000 of a model."""
    model: str | None = None
    """Instead of samples: a bundled name or a predictor's file."""
    refiner: str | None = None
    """The refiner's file; a bundled model brings its own."""
    vae: str | None = None
    """As for sample."""
    plans: tuple[str, ...] = ("H1P5R3",)
    """Plans that make images, letters or .json files, each from the same noise. Image i is of class
    i % (number of classes).
    """
    guidance: float = 1.5
    """Scale of classifier-free guidance, 1 for none."""
    guidance_channels: int | None = None
    """Guide the first so many channels; left out: 3 of 4 for SiT's checkpoints, else all."""
    seed: int = 0
    """Image i draws its noise from (seed, i) alone."""
    batch_size: int = 50
    """Images at a time, in the model and in Inception."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the model; left out: bfloat16 on a GPU, float32 on the CPU. Inception runs in float32."""
    device: str | None = None
    """"cuda" or "cpu"; left out: a GPU if there is one."""

    def __post_init__(self) -> None:
        given = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        metrics = tuple(
            dict.fromkeys(name for words in given for name in words.replace(",", " ").split())
        )
        object.__setattr__(self, "metrics", metrics)
        if not metrics or not set(metrics) <= set(TITLES):
            raise ValueError(
                f"metrics must be some of {', '.join(TITLES)}, got {', '.join(metrics) or 'none'}"
            )
        for name in ("reference", "samples", "out", "inception"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if (self.samples is None) == (self.model is None):
            raise ValueError(
                "give samples or a model to make them, "
                f"{'one' if self.samples is None else 'not both'}"
            )
        if self.reference is None and metrics != ("is",):
            raise ValueError("reference must be given: all metrics but is compare with one")
        finite("guidance", self.guidance)
        natural("seed", self.seed)
        positive("batch_size", self.batch_size)
        if self.images is not None:
            positive("images", self.images)
        if isinstance(self.plans, str) or not self.plans:
            raise ValueError(f"plans must be a list of at least one plan, got {self.plans!r}")
        for plan in self.plans:
            as_plan(plan)


def fidelity(settings: Fidelity, network: FeatureNetwork | None = None) -> Path:
    """Score every plan, or the samples; returns the path of the table, report.md.

    network: whose features are compared; None: Inception's, as published scores need.
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
    results["files"] = files  # they may have moved: their digests are compared
    write_text(path, json.dumps(results, indent=1) + "\n")
    rows = {row["samples"]: row for row in results["rows"]}
    for name, images in sets.items():
        row = rows.setdefault(name, {"samples": name, "images": len(images)})
        missing = [metric for metric in settings.metrics if metric not in row]
        if missing:
            row |= _row(settings, results, reference, name, images, network, device, missing)
            results["rows"] = list(rows.values())
            write_text(path, json.dumps(results, indent=1) + "\n")
    write_text(settings.out / "report.md", fidelity_table(results))
    return settings.out / "report.md"


def _check_reference(settings: Fidelity, reference: Reference | None) -> None:
    """That it holds what the metrics take of it."""
    if reference is None or reference.images is not None:
        return
    has = {"fid": reference.pool is not None, "sfid": reference.spatial is not None, "is": True}
    lacking = [metric for metric in settings.metrics if not has.get(metric, False)]
    if lacking:
        raise ValueError(
            f"reference {settings.reference} has no arr_0, the images that {', '.join(lacking)} "
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
            "vae must be given: images are scored, and the model's file names none that decodes "
            "its latents"
        )
    refined = [plan for plan in settings.plans if as_plan(plan).cost.refiner]
    if refined and model.refiner is None:
        raise ValueError(f"refiner must be given: of the plans, {', '.join(refined)} need one")
    return model


def _samples(settings: Fidelity, model: FlowModel | None) -> dict[str, ImageSet]:
    """The sets to score, by what their rows are called."""
    if model is not None:
        count = 50_000 if settings.images is None else settings.images
        plans = map(as_plan, settings.plans)
        how = (
            count,
            settings.guidance,
            settings.guidance_channels,
            settings.seed,
            settings.batch_size,
        )
        return {plan.name: GeneratedImages(model, plan, *how) for plan in plans}
    assert settings.samples is not None
    images = open_images(settings.samples, "samples")
    if settings.images is not None and settings.images > len(images):
        raise ValueError(
            f"images must be at most the {len(images)} of {settings.samples}, got {settings.images}"
        )
    return {"samples": images if settings.images is None else _First(images, settings.images)}


class _First:
    """The first images of a set."""

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
        "samples": _described(settings, model, sets),
        "reference": {} if reference is None else dict(reference.description),
        "network": dict(network.description),
        "environment": environment(device, model.dtype if model else torch.float32),
        "protocol": {"split": SPLIT, "neighbours": NEIGHBOURS},
    }
    if device.type != "cpu":
        del identity["environment"]["threads"]  # on which nothing depends there
    return identity


def _described(
    settings: Fidelity, model: FlowModel | None, sets: Mapping[str, ImageSet]
) -> dict[str, Any]:
    """What the samples are and all that a rerun needs to make them. Plans may be added, so they are
    in the rows.
    """
    if model is None:
        return dict(next(iter(sets.values())).description)
    guided = (
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
        "guidance": settings.guidance,
        "guidance_channels": guided,
        "seed": settings.seed,
        "seed_rule": "noise of image i: flowturbo.noise(latent_shape, seed, [i])",
        "label_rule": f"class of image i: i % {model.num_classes}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounding": "127.5 x + 128, cut off, to uint8",
    }


class Compared(NamedTuple):
    """What metrics are taken of. gaussians: of pool and spatial features of the reference."""

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


def _is(compared: Compared) -> dict[str, float]:
    mean, deviation = inception_score(compared.network.logits(compared.samples.pool), SPLIT)
    return {"is": mean, "is_std": deviation}


def _precision_recall(compared: Compared) -> dict[str, float]:
    assert compared.reference is not None
    found = precision_recall(
        compared.reference.pool, compared.samples.pool, NEIGHBOURS, compared.device
    )
    return dict(zip(("precision", "recall"), found, strict=True))


METRICS: dict[str, Callable[[Compared], dict[str, float]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "is": _is,
    "precision": _precision_recall,
    "recall": _precision_recall,
}
"""What gives each metric; precision comes with recall."""


def _row(
    settings: Fidelity,
    results: Mapping[str, Any],
    reference: Reference | None,
    name: str,
    images: ImageSet,
    network: FeatureNetwork,
    device: torch.device,
    metrics: Sequence[str],
) -> dict[str, float]:
    """The figures of one set."""
    of_reference = {k: results[k] for k in ("reference", "network", "environment", "settings")}
    of_samples = {k: results[k] for k in ("samples", "network", "environment", "settings")} | {
        "name": name
    }
    features = settings.out / "features"
    target = None
    if reference is not None and _needs_images(reference, metrics):
        assert reference.images is not None
        target = stored_features(
            reference.images, network, features / "reference", of_reference, settings.batch_size
        )
    found = stored_features(images, network, features / name, of_samples, settings.batch_size)
    gaussians = (None, None) if reference is None else (reference.pool, reference.spatial)
    # Not every other device has float64.
    compared = Compared(
        found, target, gaussians, network, device if device.type == "cuda" else torch.device("cpu")
    )
    figures: dict[str, float] = {}
    for metric in metrics:
        if metric not in figures:
            figures |= METRICS[metric](compared)
    return figures


def _needs_images(reference: Reference, metrics: Sequence[str]) -> bool:
    without = (
        {"is"} | ({"fid"} if reference.pool else set()) | ({"sfid"} if reference.spatial else set())
    )
    return not set(metrics) <= without
