"""Folders of small images, and their encoding."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowturbo.data.encode import Encode
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import load_tensors

CPU = torch.device("cpu")


class Halved:
    """A VAE by exact sums: three channels of half the side, weighted so that left and right differ,
    and a standard deviation.
    """

    scale, shift = 0.5, 0.25

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.permute(0, 3, 1, 2).float()
        mean = (x[..., ::2, ::2] + 2 * x[..., 1::2, 1::2]) / 510
        return mean, mean / 8

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def make_images(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in (("cat", 5), ("dog", 2), ("zebra", 4)):
        (path / name).mkdir(parents=True)
        for i in range(count):
            values = rng.integers(256, size=(8 + 5 * i, 30 - 4 * i, 3), dtype=np.uint8)
            Image.fromarray(values).save(path / name / f"{i}.png")
    return path


def settings(source: Path, out: Path, **changes: object) -> Encode:
    defaults: dict[str, object] = dict(
        source=source,
        out=out,
        vae="any",
        image_size=8,
        batch_size=2,
        shard_size=4,
        dtype="float32",
        device="cpu",
    )
    return Encode(**(defaults | changes))  # type: ignore[arg-type]


def contents(out: Path) -> dict[str, tuple[dict[str, Tensor], object]]:
    return {path.name: load_tensors(path) for path in sorted(out.iterdir())}


def equal(a: Path, b: Path) -> bool:
    """The same files with the same names, tensors and descriptions."""
    left, right = contents(a), contents(b)
    return left.keys() == right.keys() and all(
        left[f][1] == right[f][1]
        and left[f][0].keys() == right[f][0].keys()
        and all(
            torch.equal(v, right[f][0][k]) and v.dtype == right[f][0][k].dtype
            for k, v in left[f][0].items()
        )
        for f in left
    )


def batches(data: object, count: int) -> Tensor:
    return data.batch(np.arange(4 * count) % count, StepRandom(7, 3, range(4 * count)))[0]  # type: ignore[attr-defined]
