"""Evaluations of a small random model of three classes on a small training set of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import CONFIG, random_sit

from flowturbo.data.latents import Latents
from flowturbo.evaluation.quality import Evaluate
from flowturbo.models.checkpoint import save_sit

THREE = replace(CONFIG, hidden=16, heads=2, channels=3, num_classes=3)
COUNTS = (30, 20, 10)
HELD = (12, 12, 6)
NAMES = {"quality.json", "quality.md", "quality.png", "classifier.safetensors"}


def drawn(seed: int, counts: tuple[int, ...], flipped: bool = True) -> Latents:
    """Pictures (N, 3, 8, 8) whose left half is bright in a colour that is their class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    x = 0.5 * torch.rand(len(labels), 3, 8, 8, generator=draw) - 0.75
    x[torch.arange(len(labels)), labels, :, :4] += 1
    return Latents(x, labels, latents_flipped=x.flip(3) if flipped else None)


def write(path: Path, data: Latents) -> str:
    flipped = {} if data.latents_flipped is None else {"latents_flipped": data.latents_flipped}
    np.savez(path, latents=data.mean, labels=data.labels, **flipped)
    return str(path)


def networks_in(folder: Path) -> tuple[Path, Path]:
    """The files of a predictor and a refiner."""
    paths = folder / "predictor.safetensors", folder / "refiner.safetensors"
    save_sit(paths[0], random_sit(THREE, 0))
    save_sit(paths[1], random_sit(THREE.refiner(), 1))
    return paths


def sets_in(folder: Path) -> tuple[str, str]:
    """The files of the training set and of held-out pictures."""
    return (
        write(folder / "train.npz", drawn(0, COUNTS)),
        write(folder / "held-out.npz", drawn(1, HELD)),
    )


def class_settings(models, sets: tuple[str, str | None], out: Path, **changes) -> Evaluate:
    few = dict(
        images=60, batch_size=20, reference_images=30, reference_plan="C5", classifier_steps=5
    )
    defaults = dict(
        plans=("E2", "H1R1"), device="cpu", model=str(models[0]), refiner=str(models[1]), out=out
    )
    both = dict(data=sets[0], held_out=sets[1])
    return Evaluate(**{**few, **defaults, **both, **changes})


def kernel(x: list[float], y: list[float]) -> float:
    return (sum(i * j for i, j in zip(x, y, strict=True)) / len(x) + 1) ** 3


def mean_kernel(x: list[list[float]], y: list[list[float]]) -> float:
    """Over all pairs, without pairs of a row with itself if the two are one."""
    pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if x is not y or i != j]
    return sum(kernel(x[i], y[j]) for i, j in pairs) / len(pairs)


def double_loop(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased squared MMD with KID's kernel, pair by pair, in Python's float64."""
    x, y = a.double().tolist(), b.double().tolist()
    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def class_double_loop(a, labels_a, b, labels_b, shares: torch.Tensor) -> float:
    """The same of mixtures: the mean over the classes of two pictures, drawn by their shares."""
    classes = [c for c, share in enumerate(shares.tolist()) if share]
    x, y = (
        {c: s[d == c].double().tolist() for c in classes} for s, d in ((a, labels_a), (b, labels_b))
    )
    total = 0.0
    for c in classes:
        for d in classes:
            mean = mean_kernel(x[c], x[d]) + mean_kernel(y[c], y[d]) - 2 * mean_kernel(x[c], y[d])
            total += float(shares[c] * shares[d]) * mean
    return total
