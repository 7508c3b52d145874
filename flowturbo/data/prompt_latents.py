"""Training data with prompts: latents and encoded captions from `flowturbo encode --model`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from ..models.text_to_image import Labels
from ..runtime.rng import StepRandom
from ..storage.files import CheckpointError, load_tensors
from .latents import flips, sample_posterior
from .shards import check_no_images, check_set, shards_of

_LATENTS = ("latents", "std", "latents_flipped", "std_flipped")
_CONDITIONS = ("embeds", "pooled", "lengths")


class PromptLatents:
    """Shards of latents and encoded prompts, whose rows are read from disk when a batch needs them.

    The encoded prompts of a training set may not fit in memory: for FLUX each takes 4 MB.

    null: the conditions of the empty prompt, one row each.
    CheckpointError for shards that are damaged or do not form one complete set.
    """

    num_classes = 0
    class_names: tuple[str, ...] | None = None

    def __init__(self, paths: list[Path]) -> None:
        loaded = {}
        descriptions: dict[Path, dict[str, Any] | None] = {}
        for path in paths:
            # One file in memory at a time; loading verifies its digest.
            tensors, descriptions[path] = load_tensors(path)
            loaded[path] = _checked(path, tensors)
        check_set(descriptions)
        first = loaded[paths[0]]
        for path, shard in loaded.items():
            if shard.shapes != first.shapes:
                raise CheckpointError(
                    f"{path} holds {shard.shapes}, but {paths[0].name} holds {first.shapes}"
                )
        self.null = first.null
        self.shape = first.shapes["latents"]
        self._paths, self._ends = paths, np.cumsum([shard.rows for shard in loaded.values()])
        self._names = list(first.shapes)
        self._open: dict[Path, safetensors.safe_open] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: np.ndarray, draws: StepRandom) -> tuple[Tensor, Labels]:
        """indices (N,) -> latents (N, C, H, W) and conditions (N, ...), float32; lengths int64."""
        rows = [self._row(int(index)) for index in indices]
        tensors = {name: _wide(torch.cat([row[name] for row in rows])) for name in self._names}
        mean, std = tensors["latents"], tensors.get("std")
        if "latents_flipped" in tensors:
            flip = flips(draws).view(-1, *[1] * (mean.ndim - 1))
            mean = torch.where(flip, tensors["latents_flipped"], mean)
            std = None if std is None else torch.where(flip, tensors["std_flipped"], std)
        conditions = {name: tensors[name] for name in _CONDITIONS if name in tensors}
        return sample_posterior(mean, std, draws), conditions

    def _row(self, index: int) -> dict[str, Tensor]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path, row = self._paths[shard], index - (self._ends[shard - 1] if shard else 0)
        if path not in self._open:
            self._open[path] = safetensors.safe_open(path, framework="pt")
        return {name: self._open[path].get_slice(name)[row : row + 1] for name in self._names}


class _Shard(NamedTuple):
    """What is kept in memory of a shard. shapes: of one row of each tensor."""

    rows: int
    shapes: dict[str, tuple[int, ...]]
    null: dict[str, Tensor]


def _checked(path: Path, tensors: dict[str, Tensor]) -> _Shard:
    rows = {name: tensor for name, tensor in tensors.items() if name in (*_LATENTS, *_CONDITIONS)}
    conditions = [name for name in _CONDITIONS if name in rows]
    missing = [
        name
        for name in ("latents", "embeds", *(f"null_{name}" for name in conditions))
        if name not in tensors
    ]
    if missing:
        raise CheckpointError(
            f"{path} must hold {', '.join(missing)}, got {', '.join(sorted(tensors)) or 'nothing'}"
        )
    counts = {name: len(tensor) for name, tensor in rows.items()}
    if len(set(counts.values())) > 1 or not counts["latents"]:
        raise CheckpointError(
            f"{path} must hold as many rows of each kind, at least one, got {counts}"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} must be finite, got NaN or infinity in them")
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in rows.items()}
    return _Shard(
        counts["latents"], shapes, {name: _wide(tensors[f"null_{name}"]) for name in conditions}
    )


def _wide(values: Tensor) -> Tensor:
    """In float32, but whole numbers as they are."""
    return values.float() if values.is_floating_point() else values


def load_prompts(folder: str | os.PathLike[str]) -> PromptLatents:
    """Open the folder of shards that `flowturbo encode --model` wrote.

    ValueError for a folder without shards, CheckpointError for an incomplete or damaged set.
    """
    path = Path(folder)
    shards = shards_of(path) if path.is_dir() else []
    if not shards:
        raise ValueError(
            "data must be a folder of shards that `flowturbo encode --model` wrote, got "
            f"{str(folder)!r}"
        )
    check_no_images(path)
    return PromptLatents(shards)
