"""A small random network in the place of Inception, for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowturbo.evaluation.inception import Features

POOL, SPATIAL, CLASSES = 6, 9, 5


class RandomNetwork:
    """Features of seeded random weights; `asked` counts the images. before: called with that count
    at each reading.
    """

    def __init__(self, seed: int = 0, before: Callable[[int], object] = lambda asked: None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pool, self.spatial, self.head = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((48, POOL), (48, SPATIAL), (POOL, CLASSES))
        )
        self.description = {"name": "random", "seed": seed, "widths": [POOL, SPATIAL]}
        self.asked, self.before = 0, before

    def read(self, images: np.ndarray) -> Features:
        assert images.dtype == np.uint8
        assert images.shape[3] == 3
        self.before(self.asked)
        self.asked += len(images)
        small = F.adaptive_avg_pool2d(
            torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255, 4
        ).flatten(1)
        return Features((small @ self.pool).tanh().float(), (small @ self.spatial).abs().float())

    def logits(self, pool: Tensor) -> Tensor:
        return 4 * pool.double() @ self.head
