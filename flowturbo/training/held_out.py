"""The loss on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data.latents import Data
from ..models.flow_model import Network
from ..models.text_to_image import Labels
from ..runtime.rng import StepRandom, stream
from .objectives import Objective

MOST = 1024
"""Rows of the held-out data that are used, at most: evenly spread over it."""
_BATCH = 64
_SEED = 1  # the noise is the same in all trainings, so that they can be compared


class HeldOut:
    """The mean of an objective over held-out data, always with the same times and noise.

    objective: of one batch. autocast: makes the context that the network runs in.
    """

    def __init__(
        self, data: Data, objective: Objective, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.data, self.objective, self.autocast = data, objective, autocast
        self.indices = np.linspace(0, len(data) - 1, min(MOST, len(data))).round().astype(np.int64)

    @torch.no_grad()
    def loss(self, network: nn.Module) -> float:
        """Of this network, which is not changed."""
        device = next(network.parameters()).device
        training, total = network.training, 0.0
        network.eval()
        for first in range(0, len(self.indices), _BATCH):
            indices = self.indices[first : first + _BATCH]
            draws = StepRandom(_SEED, 0, range(first, first + len(indices)))
            # What rows share, such as a refiner's delta or plan, is another one for each batch.
            draws.shared = stream(_SEED, first // _BATCH)
            latents, labels = self.data.batch(indices, draws)
            with self.autocast():
                loss = self.objective(
                    cast(Network, network), latents.to(device), moved(labels, device), draws
                )
            total += float(loss) * len(indices)
        network.train(training)
        return total / len(self.indices)


def moved(labels: Labels, device: torch.device) -> Labels:
    """The labels or conditions on this device."""
    return (
        labels.to(device)
        if isinstance(labels, Tensor)
        else {name: value.to(device) for name, value in labels.items()}
    )
