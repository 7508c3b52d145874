"""The noise levels of a pipeline, and what its network is told at each.

The level sigma is diffusers': 1 is noise, 0 is data; with `invert_sigmas` the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def resampled(levels: Any, count: int) -> Any:
    """Noise levels or timesteps, a sequence, array or tensor, interpolated to `count` steps.

    Falling ones end before 0, which is added for the interpolation and left out of the result; a 0
    at their end is taken for that one.
    Rising ones (Cosmos 2) are interpolated as they are.
    Returns a list for a list, else an array; some schedulers take but one of them.
    """
    if isinstance(levels, Tensor):
        levels = levels.detach().cpu().numpy()
    if len(levels) == count:
        return levels
    if len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    if len(levels) == count:
        return levels
    knots = np.asarray(levels, dtype=np.float64)
    if len(knots) > 1 and knots[-1] > knots[0]:
        places = np.linspace(0, len(knots) - 1, count)
    else:
        knots = np.append(knots, 0.0)
        places = np.linspace(0, len(knots) - 1, count + 1)[:-1]
    found = np.interp(places, np.arange(len(knots)), knots)
    return found if isinstance(levels, np.ndarray) else found.tolist()


class Timesteps:
    """What the network is told at a noise level, as the stock scheduler tells it.

    sigmas: the stock scheduler's, one more than timesteps.
    train: num_train_timesteps.
    At the stock scheduler's own levels it is the stock scheduler's own timestep. Between them it is
    `train` times the level where timesteps are that, else it is interpolated: pipelines that give
    timesteps beside noise levels shift only the latter.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor, train: float) -> None:
        self.dtype = timesteps.dtype
        levels, told = sigmas.tolist(), timesteps.tolist()
        self._known = dict(zip(levels, told, strict=False))
        self._train = train
        # The stock scheduler may round down to whole timesteps.
        slack = 1e-5 * train if self.dtype.is_floating_point else 1.0
        self._proportional = all(
            abs(t - train * level) <= slack for level, t in self._known.items()
        )
        ends = {levels[-1]: train * levels[-1]} | self._known
        self._points = sorted(ends)
        self._told = [ends[level] for level in self._points]

    def at(self, levels: Sequence[float], device: torch.device) -> Tensor:
        """The timesteps at these levels, (len(levels),)."""
        told = [self._known.get(level, self._between(level)) for level in levels]
        wide = torch.tensor(told, dtype=torch.float64, device="cpu")
        return wide.to(self.dtype).to(device)

    def _between(self, level: float) -> float:
        if self._proportional:
            return self._train * level
        return float(np.interp(level, self._points, self._told))
