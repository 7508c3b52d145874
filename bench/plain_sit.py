"""SiT as its users run it: nn modules and torch's own attention, in any precision that torch casts
to. The rivals' network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

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
        self.norm1, self.norm2 = (
            nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.attn, self.mlp = Attention(hidden, heads), MLP(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.modulated(x, self.adaLN_modulation(c))

    def modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations.chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Final(nn.Module):
    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.modulated(x, self.adaLN_modulation(c))

    def modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *modulations.chunk(2, dim=1)))


class TimeEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * frequencies
        return self.mlp(
            torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype)
        )


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
        h = self.embed(x, v)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))

    def embed(self, x: Tensor, v: Tensor | None) -> Tensor:
        return self.x_embedder(x if v is None else torch.cat([x, v], dim=1)) + self.pos_embed

    def unpatchify(self, h: Tensor) -> Tensor:
        config, p = self.config, self.config.patch
        side = config.side // p
        out = h.view(len(h), side, side, p, p, config.out_channels)
        out = torch.einsum("nhwpqc->nchpwq", out).reshape(
            len(h), config.out_channels, config.side, config.side
        )
        return out[:, : config.channels]


class HoistedSiT(nn.Module):
    """A PlainSiT in parts, as this library's sampler takes them: the modulations of all layers and
    times are one product, apart from x, and the GELU of a block is done by its product. compiled:
    what is made of the part that reads x.
    """

    def __init__(
        self,
        network: PlainSiT,
        compiled: Callable[[nn.Module], Callable[..., Tensor]] = lambda part: part,
    ) -> None:
        super().__init__()
        layers = [
            *(block.adaLN_modulation for block in network.blocks),
            network.final_layer.adaLN_modulation,
        ]
        products = [cast(nn.Linear, layer[1]) for layer in layers]
        self.sizes = [len(product.weight) for product in products]
        self.register_buffer("weight", torch.cat([product.weight for product in products]))
        self.register_buffer("bias", torch.cat([product.bias for product in products]))
        for block in network.blocks:
            block.mlp = FusedMLP(block.mlp.fc1, block.mlp.fc2)
        self.network = network
        self._compiled = (
            compiled(_Evaluate(network)),
        )  # in a tuple, so that the weights in it are not named twice

    @property
    def modulation_width(self) -> int:
        return sum(self.sizes)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (S,), y (N,) -> (S, N, D)."""
        return self.network.t_embedder(t)[:, None] + self.network.y_embedder(y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        """c (..., D) -> (..., 6D) a block, (..., 2D) for the final layer, each contiguous."""
        made = F.linear(F.silu(c), self.weight, self.bias)
        return [m.contiguous() for m in made.split(self.sizes, dim=-1)]

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) and modulations of N or 2N rows, v of as many -> what `PlainSiT` returns,
        of as many.
        """
        return self._compiled[0](x, list(modulations), v)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        return self.evaluate(
            x, self.modulations(self.network.t_embedder(t) + self.network.y_embedder(y)), v
        )


class _Evaluate(nn.Module):
    def __init__(self, network: PlainSiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, modulations: list[Tensor], v: Tensor | None = None) -> Tensor:
        network, dtype, times = (
            self.network,
            self.network.pos_embed.dtype,
            len(modulations[0]) // len(x),
        )
        x = x.to(dtype)
        if v is None:
            h = network.embed(x, None).repeat(times, 1, 1)
        else:
            h = network.embed(x.repeat(times, 1, 1, 1), v.to(dtype))
        for block, m in zip(network.blocks, modulations[:-1], strict=True):
            h = block.modulated(h, m)
        return network.unpatchify(network.final_layer.modulated(h, modulations[-1]))


class FusedMLP(nn.Module):
    """An MLP whose first product does the GELU as it writes, where torch can: in cuBLASLt, for
    weights that are not quantised.
    """

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        # A quantised layer may be another class, or an nn.Linear whose weight is.
        self.fused = isinstance(fc1, nn.Linear) and type(fc1.weight) is nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or not self.fused:  # the CPU's is another GELU
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        h = torch._addmm_activation(
            self.fc1.bias, x.flatten(0, -2), self.fc1.weight.t(), use_gelu=True
        )
        return self.fc2(h.view(*x.shape[:-1], -1))
