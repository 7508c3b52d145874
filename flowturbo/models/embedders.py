"""The embedders of a SiT: of patches, times and labels, and the positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowturbo_kernels import patch_embed
from flowturbo_kernels.batch_invariant import elementwise, silu
from flowturbo_kernels.conditions import MAX_PERIOD

from .sit_config import TIME_FEATURES


class SiLU(nn.Module):
    """x * sigmoid(x), the same for a sample in any batch."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class TimestepEmbedder(nn.Module):
    """t (N,) in [0, 1], not scaled -> (N, D).

    256 sinusoidal features, cosines first, and a two-layer perceptron.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden), SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, t: Tensor) -> Tensor:
        dtype = torch.promote_types(t.dtype, torch.float32)
        half = TIME_FEATURES // 2
        steps = torch.arange(half, dtype=dtype, device=t.device) / half
        angles = t.to(dtype)[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
        features = torch.cat(
            [elementwise(torch.cos, angles), elementwise(torch.sin, angles)], dim=-1
        )
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """y (N,) int64 -> (N, D); a null class is the last row of the table."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    """x (N, C, H, W), for a refiner with v -> tokens (N, T, D), position embedding included.

    copies: 2 for the same tokens twice. ahead, step: ahead * step is added to x before.
    """

    def __init__(self, in_channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden, patch, stride=patch)

    def forward(
        self,
        x: Tensor,
        v: Tensor | None,
        positions: Tensor,
        copies: int = 1,
        ahead: Tensor | None = None,
        step: float = 0.0,
    ) -> Tensor:
        assert self.proj.bias is not None
        return patch_embed(x, self.proj.weight, self.proj.bias, v, positions, copies, ahead, step)


def sincos_positions(hidden: int, side: int) -> Tensor:
    """Fixed 2-D sine and cosine position embedding, (side * side, hidden), float32.

    The first half of the features encodes the column, the second half the row.
    """
    omega = 1.0 / MAX_PERIOD ** (torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    features = []
    for coordinates in (columns, rows):
        angles = coordinates.reshape(-1, 1) * omega
        features += [angles.sin(), angles.cos()]
    return torch.cat(features, dim=1).float()
