"""The embedders of a SiT: of patches, times and labels."""

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
