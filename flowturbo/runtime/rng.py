"""Random numbers that depend only on a seed and on what they are for.

Nothing depends on what was drawn before, so images and training rows can be computed in any order
and by any process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..checks import natural


def stream(seed: int, number: int, lane: int = 0) -> np.random.Generator:
    """The generator of (seed, number, lane).

    Philox (Salmon et al. 2011), with the seed as its key, and number and lane in the high words of
    its counter.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, number, lane]))


def noise(shape: Sequence[int], seed: int, images: Iterable[int]) -> Tensor:
    """Standard normal noise, (number of images, *shape), float32, on the CPU.

    Row k depends on (seed, images[k]) alone, to the last bit. So any part of a set of images can be
    made anywhere, in any order.
    shape: of one image's latent, such as (C, H, W).
    seed, images: integers from 0 to 2**63 - 1. Raises ValueError or TypeError for others.
    """
    numbers = [natural("images", i) for i in images]
    key = natural("seed", seed)
    rows = np.empty((len(numbers), *shape), dtype=np.float32)
    for row, number in zip(rows, numbers, strict=True):
        stream(key, number).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


def later_noise(noise: Tensor, shape: Sequence[int], lane: int) -> Tensor:
    """More noise for images that have some: (N, *shape), float32, on the CPU.

    Row k depends on row k of `noise`, in float32, and on lane alone, to the last bit. So it needs
    no seed and no number, and noise of any origin will do.
    noise: (N, ...).
    """
    rows = np.empty((len(noise), *shape), dtype=np.float32)
    for row, own in zip(rows, noise.float().cpu().contiguous().numpy(), strict=True):
        key = int.from_bytes(hashlib.blake2b(own.tobytes(), digest_size=16).digest(), "little")
        philox = np.random.Philox(key=key, counter=[0, 0, 0, lane])
        np.random.Generator(philox).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


_CLASSES = 2**62  # a lane that noise and training do not use


def random_classes(num_classes: int, seed: int, images: Iterable[int]) -> np.ndarray:
    """A uniformly drawn class number for each image, (number of images,), int64.

    Element k depends on (seed, images[k]) alone, as the noise does.
    """
    key = natural("seed", seed)
    return np.array(
        [stream(key, natural("images", i), _CLASSES).integers(num_classes) for i in images],
        dtype=np.int64,
    )


class StepRandom:
    """The random numbers of some rows of one training step.

    Row j of step k draws from (seed, k, j) alone. So the way a batch is split over processes
    changes nothing, and a resumed run needs no stored generator state.
    """

    def __init__(self, seed: int, step: int, rows: Iterable[int]) -> None:
        self._rows = [stream(seed, step, 1 + row) for row in rows]
        self.shared = stream(seed, step)
        """A generator for the whole batch, the same in every process."""

    def __len__(self) -> int:
        return len(self._rows)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, (rows, *shape), float32."""
        return torch.from_numpy(
            np.stack([g.standard_normal(tuple(shape), dtype=np.float32) for g in self._rows])
        )

    def uniform(self) -> Tensor:
        """Uniform numbers in [0, 1), (rows,), float32."""
        return torch.from_numpy(
            np.array([g.random(dtype=np.float32) for g in self._rows], dtype=np.float32)
        )
