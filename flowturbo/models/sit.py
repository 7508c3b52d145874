"""SiT: the diffusion transformer of Ma et al. 2024 (arXiv 2401.08740), one class for predictor and
refiner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from flowturbo_kernels import (
    adaln_modulate,
    attention,
    gated_residual_adaln,
    linear,
    patch_embed,
)
from flowturbo_kernels.batch_invariant import elementwise, matmul, silu
from flowturbo_kernels.linear import Activation
from flowturbo_kernels.refiner_forward import BlockWeights, Linear, RefinerWeights

from ..checks import positive
from .fp8 import Fp8Linear

TIME_FEATURES = 256
MAX_PERIOD = 10_000


@dataclass(frozen=True)
class SiTConfig:
    """Sizes of a SiT. side: height and width of the latent; channels: of latent and velocity;
    num_classes without the null class.

    learned_sigma: the final layer has twice the channels; the second half is not used.
    reads_velocity: the input is x and a velocity (a refiner).
    """

    hidden: int
    depth: int
    heads: int
    patch: int
    side: int
    channels: int = 4
    num_classes: int = 1000
    learned_sigma: bool = True
    reads_velocity: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "depth", "heads", "patch", "side", "channels", "num_classes"):
            positive(name, getattr(self, name))
        if self.hidden % self.heads:
            raise ValueError(f"heads must divide the hidden size {self.hidden}, got {self.heads}")
        if self.hidden % 4:
            raise ValueError(
                f"hidden must be a multiple of 4 (2-D sine and cosine positions), got {self.hidden}"
            )
        if self.side % self.patch:
            raise ValueError(f"patch must divide the latent side {self.side}, got {self.patch}")

    @property
    def in_channels(self) -> int:
        return self.channels * (2 if self.reads_velocity else 1)

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learned_sigma else 1)

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def null_class(self) -> int:
        """The label of the unconditional half: the last row of the label table."""
        return self.num_classes

    def refiner(self, depth: int = 1) -> SiTConfig:
        """The refiner of this predictor: the same trunk, `depth` blocks, reading x and v (paper
        section 3.2).
        """
        return replace(self, depth=depth, reads_velocity=True)

    def macs(self) -> int:
        """Multiply-accumulates of one forward of one sample, of all matrix products."""
        return self.trunk_macs() + self.conditioning_macs()

    def trunk_macs(self) -> int:
        """Those that read x."""
        D, T = self.hidden, self.tokens
        ends = T * self.patch**2 * (self.in_channels + self.out_channels) * D
        return self.depth * (T * 12 * D * D + 2 * T * T * D) + ends

    def conditioning_macs(self) -> int:
        """Those that read time and label alone."""
        D = self.hidden
        return (6 * self.depth + 2) * D * D + TIME_FEATURES * D + D * D


SIT_SIZES: dict[str, dict[str, int]] = {
    "S": dict(hidden=384, depth=12, heads=6),
    "B": dict(hidden=768, depth=12, heads=12),
    "L": dict(hidden=1024, depth=24, heads=16),
    "XL": dict(hidden=1152, depth=28, heads=16),
}
SIT_CONFIGS: dict[str, SiTConfig] = {
    f"SiT-{name}/{patch}": SiTConfig(patch=patch, side=32, **sizes)  # type: ignore[arg-type]
    for name, sizes in SIT_SIZES.items()
    for patch in (2, 4, 8)
}


def affine(layer: nn.Linear | Fp8Linear, x: Tensor, activation: Activation | None = None) -> Tensor:
    if isinstance(layer, Fp8Linear):
        return layer(x, activation)
    return linear(x, layer.weight, layer.bias, activation)


class Attention(nn.Module):
    qkv: nn.Linear | Fp8Linear
    proj: nn.Linear | Fp8Linear

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        y = attention(affine(self.qkv, x).view(B, T, 3, self.heads, D // self.heads))
        return affine(self.proj, y)


class MLP(nn.Module):
    fc1: nn.Linear | Fp8Linear
    fc2: nn.Linear | Fp8Linear

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return affine(self.fc2, affine(self.fc1, x, "gelu_tanh"))


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class AdaLN(nn.Sequential):
    """c (..., D) -> `chunks` modulations in one, (..., chunks * D)."""

    def __init__(self, hidden: int, chunks: int) -> None:
        super().__init__(SiLU(), nn.Linear(hidden, chunks * hidden))

    def forward(self, c: Tensor) -> Tensor:
        product = cast(nn.Linear, self[1])
        return matmul(silu(c), product.weight, product.bias)


class Block(nn.Module):
    """The parameters of one DiT block; SiT.forward runs its two branches, since the seams between
    branches are fused.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(hidden, heads)
        self.mlp = MLP(hidden)
        self.adaLN_modulation = AdaLN(hidden, 6)


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, out_features)
        self.adaLN_modulation = AdaLN(hidden, 2)


class TimestepEmbedder(nn.Module):
    """t (N,) in [0, 1], not scaled -> (N, D): 256 features, cosines first, then a two-layer
    perceptron.
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
    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    def __init__(self, in_channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden, patch, stride=patch)

    def forward(self, x: Tensor, v: Tensor | None, positions: Tensor) -> Tensor:
        assert self.proj.bias is not None
        return patch_embed(x, self.proj.weight, self.proj.bias, v, positions)


class SiT(nn.Module):
    """A predictor, v(x, t, y), or, with config.reads_velocity, a refiner, r(x, t, y, v).

    Parameter names are those of the published checkpoints. After `reset_parameters` it returns
    zeros: its final layer is zero.
    """

    pos_embed: Tensor

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.in_channels, config.hidden, config.patch)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden)
        self.register_buffer(
            "pos_embed", sincos_positions(config.hidden, config.side // config.patch)[None]
        )
        self.blocks = nn.ModuleList(Block(config.hidden, config.heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.hidden, config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) in the weights' dtype; t (N,) float; y (N,) int64, null_class for no
        label; v (N, C, H, W) for a refiner -> (N, C, H, W): the velocity, or the refiner's offset
        of it.
        """
        return self.evaluate(x, self.modulations(self.t_embedder(t) + self.y_embedder(y)), v)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (S,) and y (N,), every time with every label -> (S, N, D): what `modulations` takes."""
        return self.t_embedder(t)[:, None] + self.y_embedder(y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        """c (..., D) -> adaLN's modulations, which nothing else enters: (..., 6D) a block, (...,
        2D) for the final layer.
        """
        layers = [
            *(block.adaLN_modulation for block in cast(Sequence[Block], self.blocks)),
            self.final_layer.adaLN_modulation,
        ]
        return [layer(c) for layer in layers]

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        """`forward` on given modulations. Their R rows may be twice those of x (N, C, H, W), which
        is then embedded once for both halves of guidance. v (R, C, H, W) -> (R, C, H, W), in the
        weights' dtype.
        """
        tokens, rows = self.x_embedder(x, v, self.pos_embed[0]), len(modulations[0])
        if len(tokens) != rows:
            tokens = tokens.repeat(rows // len(tokens), 1, 1)
        return self.unpatchify(self._trunk(tokens, modulations))

    def quantize_(self) -> SiT:
        """Put the blocks' products into fp8, in place: an error of some percent of the velocity,
        for about twice the rate.
        """
        for block in cast(Sequence[Block], self.blocks):
            for part, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
                for name in names:
                    layer = getattr(part, name)
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, Fp8Linear(layer))
        return self

    def refiner_weights(self) -> RefinerWeights:
        """The weights, not copied, as flowturbo_kernels.refiner_forward takes them. ValueError
        unless this is a refiner.
        """
        if not self.config.reads_velocity:
            raise ValueError(
                "refiner_weights needs a SiT that reads a velocity, and this one is a predictor"
            )

        def pair(layer: nn.Linear | nn.Conv2d | Fp8Linear) -> Linear:
            assert layer.bias is not None
            if isinstance(layer, Fp8Linear):
                raise ValueError("refiner_weights needs a refiner that is not quantised")
            return Linear(layer.weight, layer.bias)

        blocks = [
            BlockWeights(
                pair(block.attn.qkv),
                pair(block.attn.proj),
                pair(block.mlp.fc1),
                pair(block.mlp.fc2),
            )
            for block in cast(Sequence[Block], self.blocks)
        ]
        return RefinerWeights(
            pair(self.x_embedder.proj),
            self.pos_embed[0],
            blocks,
            pair(self.final_layer.linear),
            self.config.heads,
        )

    def _trunk(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Blocks and final layer: tokens x (N, T, D), modulations (N, 6D) and last (N, 2D) -> (N,
        T, p * p * out_channels).
        """
        blocks = cast(Sequence[Block], self.blocks)
        parts = [m.chunk(6, dim=-1) for m in modulations[:-1]]
        ends = [m[:2] for m in parts[1:]] + [modulations[-1].chunk(2, dim=-1)]
        h = adaln_modulate(x, parts[0][0], parts[0][1])
        for block, (_, _, gate_msa, shift_mlp, scale_mlp, gate_mlp), (shift, scale) in zip(
            blocks, parts, ends, strict=True
        ):
            x, h = gated_residual_adaln(x, block.attn(h), gate_msa, shift_mlp, scale_mlp)
            x, h = gated_residual_adaln(x, block.mlp(h), gate_mlp, shift, scale)
        return linear(h, self.final_layer.linear.weight, self.final_layer.linear.bias)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """tokens (N, h * w, p * p * out_channels), channels innermost -> (N, C, h * p, w * p),
        without a learned sigma.
        """
        p, side = self.config.patch, self.config.side // self.config.patch
        grid = tokens.view(len(tokens), side, side, p, p, self.config.out_channels)[
            ..., : self.config.channels
        ]
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tokens), self.config.channels, side * p, side * p
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> SiT:
        """SiT's initial weights: Xavier for products, 0.02 normal for embedders, zero for adaLN and
        the final layer.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in (self.y_embedder, self.t_embedder):
            for parameter in embedder.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, AdaLN):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)
        return self


def sincos_positions(hidden: int, side: int) -> Tensor:
    """Fixed 2-D sine and cosine positions, (side * side, hidden): the first half of the features is
    of the column.
    """
    omega = 1.0 / MAX_PERIOD ** (torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    features = []
    for places in (columns, rows):
        angles = places.reshape(-1, 1) * omega
        features += [angles.sin(), angles.cos()]
    return torch.cat(features, dim=1).float()


_BLOCK = re.compile(r"blocks\.([0-9]+)\.")


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    """One more than the largest block number, but at most twice the blocks there are: a stray
    number makes no giant model, and missing blocks show when the keys are compared one by one."""
    numbers = set()
    for name in state:
        if name.startswith("blocks."):
            found = _BLOCK.match(name)
            if found is None:
                raise ValueError(f"not a key of a SiT: {name} (blocks are named blocks.<number>.)")
            numbers.add(int(found[1]))
    return min(1 + max(numbers, default=-1), 2 * len(numbers))


def config_from_state(
    state: Mapping[str, Tensor], *, reads_velocity: bool = False, heads: int | None = None
) -> SiTConfig:
    """Sizes read off the tensors of a checkpoint; heads from the published sizes when not given.

    Raises KeyError for a missing key that sizes are read from, ValueError where the shapes fit no
    SiT or heads can't be known.
    """
    projection, table = state["x_embedder.proj.weight"], state["y_embedder.embedding_table.weight"]
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise ValueError(
            f"x_embedder.proj.weight must have shape (D, C, p, p), got {tuple(projection.shape)}"
        )
    for name, axes in (
        ("pos_embed", 3),
        ("y_embedder.embedding_table.weight", 2),
        ("final_layer.linear.weight", 2),
    ):
        if state[name].ndim != axes:
            raise ValueError(
                f"{name} must have {axes} dimensions, got shape {tuple(state[name].shape)}"
            )
    hidden, in_channels, patch, _ = projection.shape
    depth = _count_blocks(state)
    tokens = state["pos_embed"].shape[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(f"pos_embed must hold a square number of tokens, got {tokens}")
    if reads_velocity and in_channels % 2:
        raise ValueError(f"a refiner must have an even number of input channels, got {in_channels}")
    channels = in_channels // 2 if reads_velocity else in_channels
    outputs = state["final_layer.linear.weight"].shape[0]
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        raise ValueError(
            f"final_layer.linear.weight must have {patch**2 * channels} or "
            f"{2 * patch**2 * channels} rows "
            f"for patch {patch} and {channels} channels, got {outputs}"
        )
    if heads is None:
        known = {sizes["hidden"]: sizes["heads"] for sizes in SIT_SIZES.values()}
        if hidden not in known:
            raise ValueError(
                f"heads must be given: width {hidden} is none of the published {sorted(known)}"
            )
        heads = known[hidden]
    return SiTConfig(
        hidden=hidden,
        depth=depth,
        heads=heads,
        patch=patch,
        side=grid * patch,
        channels=channels,
        num_classes=table.shape[0] - 1,
        learned_sigma=outputs == 2 * patch**2 * channels,
        reads_velocity=reads_velocity,
    )
