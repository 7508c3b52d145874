"""SiT as its users run it: nn modules and torch's own attention, in any precision that torch casts to. The rivals' network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo.models.sit import MAX_PERIOD, TIME_FEATURES, SiT, SiTConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(hidden, heads), MLP(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Final(nn.Module):
    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class TimeEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PlainSiT(nn.Module):
    """A predictor, or a refiner, which reads v. Parameter names are SiT's."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.in_channels, config.hidden, config.patch)
        self.t_embedder = TimeEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden)
        self.register_buffer("pos_embed", torch.zeros(1, config.tokens, config.hidden))
        self.blocks = nn.ModuleList(Block(config.hidden, config.heads) for _ in range(config.depth))
        self.final_layer = Final(config.hidden, config.patch**2 * config.out_channels)

    @classmethod
    def of(cls, network: SiT) -> PlainSiT:
        """The same network, on the same weights."""
        with torch.device("meta"):
            made = cls(network.config)
        made.load_state_dict(network.state_dict(), assign=True)
        return made.requires_grad_(False).eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        config, p = self.config, self.config.patch
        h = self.x_embedder(x if v is None else torch.cat([x, v], dim=1)) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        side = config.side // p
        out = self.final_layer(h, c).view(len(x), side, side, p, p, config.out_channels)
        out = torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), config.out_channels, config.side, config.side)
        return out[:, : config.channels]
