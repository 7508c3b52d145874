"""A SiT at sizes other than its own, by an independent program."""

from __future__ import annotations

import math

import torch
from oracle import sit_forward
from torch import Tensor

from flowturbo.models.sit import SiT


def stretched(hidden: int, own: int, grid: tuple[int, int]) -> Tensor:
    """Positions by the centres of patches, as shares of the image, number by number, float64."""
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            numbers = []
            for at, count in ((column, grid[1]), (row, grid[0])):
                centre = (2 * at + 1) / (2 * count)  # 0 to 1
                place = centre * own - 0.5
                angles = [place * 10_000 ** (-4 * k / hidden) for k in range(hidden // 4)]
                numbers += [*map(math.sin, angles), *map(math.cos, angles)]
            rows.append(numbers)
    return torch.tensor(rows, dtype=torch.float64)


def second_reading(model: SiT, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
    """The network by the oracle, in float64, with positions of its own for the size of x."""
    config, patch = model.config, model.config.patch
    grid = x.shape[2] // patch, x.shape[3] // patch
    positions = stretched(config.hidden, config.side // patch, grid).float()
    state = {name: value.double() for name, value in model.state_dict().items()}
    state["pos_embed"] = positions.double()[None]
    both = x if v is None else torch.cat([x, v], dim=1)
    return sit_forward(state, config.heads, both.double(), t.double(), y, config.channels)
