"""Training data: latents with labels, from scikit-learn's digits, from files of latents, or from folders of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .files import CheckpointError, load_tensors
from .rng import Draws, stream


class Data(Protocol):
    """What a trainer asks of data."""

    shape: tuple[int, int, int]
    """Of one latent: (C, H, W)."""
    num_classes: int

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, draws: Draws) -> tuple[Tensor, Tensor]:
        """indices (N,) -> latents (N, C, H, W) float32 and labels (N,) int64. Anything random comes from draws."""
        ...


class Latents:
    """Latents held in memory. std: of the encoder's posterior, from which each use draws anew; None: the latents are exact."""

    def __init__(self, mean: Tensor, labels: Tensor, std: Tensor | None = None, num_classes: int | None = None) -> None:
        if mean.ndim != 4 or not len(mean):
            raise ValueError(f"latents must have shape (N, C, H, W) with N at least 1, got {tuple(mean.shape)}")
        if labels.shape != (len(mean),) or labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(mean)} whole numbers, one a latent, got shape {tuple(labels.shape)}, {labels.dtype}"
            )
        if std is not None and std.shape != mean.shape:
            raise ValueError(f"std must have the latents' shape {tuple(mean.shape)}, got {tuple(std.shape)}")
        if not mean.isfinite().all():
            raise ValueError("latents must be finite, got NaN or infinity in them")
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be from 0 on, got {int(labels.min())}")
        self.mean, self.std, self.labels = mean.float(), std, labels.to(torch.int64)
        self.shape = (mean.shape[1], mean.shape[2], mean.shape[3])
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        if int(labels.max()) >= self.num_classes:
            raise ValueError(f"labels must be below {self.num_classes}, got {int(labels.max())}")

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: np.ndarray, draws: Draws) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices)
        latents = self.mean[chosen]
        if self.std is not None:
            latents = latents + self.std[chosen].float() * draws.normal(self.shape)
        return latents, self.labels[chosen]


def digits(part: str = "train") -> Latents:
    """scikit-learn's 1797 handwritten digits, 8 x 8, as one-channel latents in [-1, 1]. part: "train", four of five; "test", the fifth."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits need scikit-learn: pip install 'flowturbo[digits]'") from None
    images, labels = load_digits(return_X_y=True)
    held_out = np.arange(len(images)) % 5 == 4
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    chosen = held_out if part == "test" else ~held_out
    pixels = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 8 - 1
    return Latents(pixels, torch.from_numpy(labels[chosen]), num_classes=10)


def load_data(source: str | os.PathLike[str]) -> Data:
    """ "digits", an .npz with arrays latents, labels and perhaps std, or a folder of .safetensors shards with the same names."""
    if source == "digits":
        return digits()
    path = Path(source)
    if path.suffix == ".npz":
        return _from_npz(path)
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if shards:
        return _from_shards(shards)
    raise ValueError(f"data must be 'digits', an .npz file or a folder of .safetensors shards, got {str(source)!r}")


def _from_npz(path: Path) -> Latents:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = {k: torch.from_numpy(arrays[k]) for k in ("latents", "labels", "std") if k in arrays}
    except Exception as error:
        raise CheckpointError(f"{path} is no whole .npz of plain arrays: {error}") from error
    return _from_parts(path, [parts])


def _from_shards(paths: list[Path]) -> Latents:
    return _from_parts(paths[0].parent, [load_tensors(path)[0] for path in paths])


def _from_parts(path: Path, parts: list[dict[str, Tensor]]) -> Latents:
    for part in parts:
        for name in ("latents", "labels"):
            if name not in part:
                raise CheckpointError(f"{path} must hold 'latents' and 'labels', got {sorted(part) or 'nothing'}")
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Latents(joined["latents"], joined["labels"], joined.get("std"))


def order(length: int, seed: int, first: int, count: int) -> np.ndarray:
    """The dataset indices of places first .. first + count in an endless series of shuffled epochs, a function of (seed, place) alone."""
    places = np.arange(first, first + count)
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(places // length):
        here = places // length == epoch
        shuffled = stream(seed, int(epoch), lane=_ORDER_LANE).permutation(length)
        indices[here] = shuffled[places[here] % length]
    return indices


_ORDER_LANE = 2**62
