"""Which rows of the data a training step takes, and of which size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..data.latents import Data, order
from ..runtime.rng import StepRandom, stream
from .settings import Settings

_DRAWS = 2**62 + 2**60  # a lane of the random streams that nothing else draws from


class Rows:
    """The rows of every step: in the order of epochs, or drawn by the weights of their classes.

    Those of a step are a function of (seed, step) alone. ValueError for class weights with data
    that has no class labels.
    """

    def __init__(self, data: Data, settings: Settings) -> None:
        self.length, self.settings = len(data), settings
        self.cumulative: np.ndarray | None = None
        if settings.class_weights != "none":
            labels = getattr(data, "labels", None)
            if labels is None:
                raise ValueError(
                    f"class_weights {settings.class_weights!r} needs data whose labels are in one "
                    "file, so not a folder of images or of prompts"
                )
            share = row_weights(np.asarray(labels), settings.class_weights)
            self.cumulative = np.cumsum(share)

    def at(self, step: int, rows: range) -> np.ndarray:
        """The indices (len(rows),) of these rows of the step's batch."""
        seed, batch = self.settings.seed, self.settings.batch_size
        if self.cumulative is None:
            return order(self.length, seed, step * batch + rows.start, len(rows))
        uniform = stream(seed, step, _DRAWS).random(batch)[rows.start : rows.stop]
        found = np.searchsorted(self.cumulative, uniform * self.cumulative[-1], side="right")
        return np.minimum(found, self.length - 1)


def row_weights(labels: np.ndarray, rule: str) -> np.ndarray:
    """labels (N,) -> the probability of each row, (N,): of a class of n rows they sum to a share
    in proportion to sqrt(n) by rule "root", and to the same by "equal".
    """
    counts = np.bincount(labels)[labels].astype(np.float64)
    weights = counts**-0.5 if rule == "root" else 1 / counts
    return weights / weights.sum()


def resized(latents: Tensor, sides: Sequence[int], share: float, draws: StepRandom) -> Tensor:
    """latents (N, C, H, W), or, in a share of the steps, their means over squares: (N, C, S, S) of
    one of the sides. The choice is the same in every process.
    """
    if not sides or draws.shared.random() >= share:
        return latents
    side = sides[int(draws.shared.integers(len(sides)))]
    return F.avg_pool2d(latents, latents.shape[-1] // side)
