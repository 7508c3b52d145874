"""SiT, the diffusion transformer of Ma et al. 2024 (arXiv 2401.08740).

One class is both predictor and refiner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo_kernels import (
    attention,
    conditions,
    final_update,
    gated_residual_adaln,
    linear,
)
from flowturbo_kernels.batch_invariant import matmul, silu
from flowturbo_kernels.conditions import MAX_PERIOD
from flowturbo_kernels.linear import Activation
from flowturbo_kernels.refiner_forward import BlockWeights, Linear, RefinerWeights, run_blocks

from ..solver.steps import Move
from .embedders import LabelEmbedder, PatchEmbedder, SiLU, TimestepEmbedder
from .fp8 import Fp8Linear, calibrate, run_blocks_fp8
from .hooks import as_made
from .positions import Positions, sincos_positions
from .sit_config import SIT_CONFIGS, SIT_SIZES, TIME_FEATURES, SiTConfig, config_from_state
from .stacked import Stackable

__all__ = [
    "MAX_PERIOD",
    "SIT_CONFIGS",
    "SIT_SIZES",
    "TIME_FEATURES",
    "SiT",
    "SiTConfig",
    "config_from_state",
    "sincos_positions",
]


def affine(layer: nn.Linear | Fp8Linear, x: Tensor, activation: Activation | None = None) -> Tensor:
    """x (..., K) -> activation(layer(x)), (..., N), in fp8 or in the weight's dtype."""
    if isinstance(layer, Fp8Linear):
        return layer(x, activation)
    return linear(x, layer.weight, layer.bias, activation)


class Attention(nn.Module):
    """Multi-head self-attention: x (B, T, D) -> (B, T, D)."""

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
    """A two-layer perceptron with tanh-GELU and four times the width: x (B, T, D) -> (B, T, D)."""

    fc1: nn.Linear | Fp8Linear
    fc2: nn.Linear | Fp8Linear

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return affine(self.fc2, affine(self.fc1, x, "gelu_tanh"))


class AdaLN(nn.Sequential):
    """Modulations by adaLN: c (..., D) -> `chunks` of them concatenated, (..., chunks * D)."""

    def __init__(self, hidden: int, chunks: int) -> None:
        super().__init__(SiLU(), nn.Linear(hidden, chunks * hidden))

    def forward(self, c: Tensor) -> Tensor:
        product = cast(nn.Linear, self[1])
        return matmul(silu(c), product.weight, product.bias)


class Block(nn.Module):
    """The parameters of one DiT block.

    SiT.forward computes its two branches, because the residual and the adaLN of the next branch are
    one fused operation.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(hidden, heads)
        self.mlp = MLP(hidden)
        self.adaLN_modulation = AdaLN(hidden, 6)


class FinalLayer(nn.Module):
    """The parameters of the final layer: adaLN and a projection to patches."""

    def __init__(self, hidden: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, out_features)
        self.adaLN_modulation = AdaLN(hidden, 2)


class SiT(Stackable):
    """A predictor v(x, t, y) or, with config.reads_velocity, a refiner r(x, t, y, v).

    Parameters have the names of the published checkpoints. After `reset_parameters` the final layer
    is zero, and so is the output.
    Latents may be of any size (H, W) whose sides are multiples of the patch: positions are those of
    its own size, stretched, see `sincos_positions`. The sizes that it was trained on are
    config.side and config.sides.
    """

    pos_embed: Tensor

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.in_channels, config.hidden, config.patch)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.label_rows, config.hidden)
        grid = config.side // config.patch
        self.register_buffer("pos_embed", sincos_positions(config.hidden, grid)[None])
        self._positions = Positions(config.hidden, grid)
        self.blocks = nn.ModuleList(Block(config.hidden, config.heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.hidden, config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        """The velocity, or the refiner's offset of it, (N, C, H, W).

        x: (N, C, H, W), in the weights' dtype.
        t: (N,), floating point, in [0, 1].
        y: (N,) int64; null_class for no label.
        v: (N, C, H, W), the velocity that a refiner reads.
        """
        return self.evaluate(x, self.modulations(self.t_embedder(t) + self.y_embedder(y)), v)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """The conditioning vectors of every time with every label, (S, N, D), for `modulations`.

        t: (S,). y: (N,).
        """
        return self.t_embedder(t)[:, None] + self.y_embedder(y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        """The adaLN modulations of c (..., D), which depend on nothing else.

        Returns (..., 6D) for each block, and (..., 2D) for the final layer.
        """
        layers = self._adaptive()
        if all(as_made(layer, AdaLN) for layer in layers):
            return self.products(silu(c))
        return [layer(c) for layer in layers]

    def _adaptive(self) -> list[AdaLN]:
        layers = [block.adaLN_modulation for block in cast(Sequence[Block], self.blocks)]
        return [*layers, self.final_layer.adaLN_modulation]

    def has_own_conditioning(self) -> bool:
        """Whether what `modulations_at` computes is this class's: the embedders of times and labels
        and adaLN's layers are those of the published models, without hooks.
        """
        return (
            type(self) is SiT
            and as_made(self.t_embedder, TimestepEmbedder)
            and as_made(self.y_embedder, LabelEmbedder)
            and all(as_made(layer, AdaLN) for layer in self._adaptive())
        )

    def modulations_at(
        self, times: Sequence[float], labels: Tensor, null: int | None
    ) -> list[Tensor]:
        """The modulations of every time with every label, (S, N, chunks * D), in few launches.

        times: S numbers. labels: (N,) int64. null: the null class, whose row is then the last of
            N + 1, or None.
        """
        table, mlp = self.y_embedder.embedding_table.weight, self.t_embedder.mlp
        first, second = cast(nn.Linear, mlp[0]), cast(nn.Linear, mlp[2])
        embedded = F.embedding(labels, table)
        c = conditions(
            embedded,
            times,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            None if null is None else table[null],
        )
        return self.products(c)

    @property
    def modulation_width(self) -> int:
        """How many numbers the modulations of one condition are, of all layers together."""
        return (6 * self.config.depth + 2) * self.config.hidden

    def stackable(self) -> list[nn.Linear]:
        """The products of all adaLN layers, but for those that were exchanged."""
        return [cast(nn.Linear, layer[1]) for layer in self._adaptive() if type(layer) is AdaLN]

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        """`forward` with modulations that are computed already.

        x: (N, C, H, W).
        modulations: N rows each for R = N, or, for both halves of guidance, R = 2N rows or N + 1,
            of which the last is that of the whole second half; x is then embedded once for both.
        v: (R, C, H, W).
        Returns (R, C, H, W) in the weights' dtype.
        """
        both = v is None and len(modulations[0]) != len(x)
        size = x.shape[-2:]
        tokens = self.x_embedder(x, v, self.positions(*size), 2 if both else 1)
        x, y, gate = self._trunk(tokens, modulations)
        shift, scale = modulations[-1].chunk(2, dim=-1)
        _, h = gated_residual_adaln(x, y, gate, shift, scale)
        final = self.final_layer.linear
        return self.unpatchify(linear(h, final.weight, final.bias), *size)

    def evaluate_and_move(
        self,
        x: Tensor,
        modulations: Sequence[Tensor],
        move: Move,
        guidance: float | Tensor | None,
        channels: int,
        v: Tensor | None = None,
        base: Tensor | None = None,
        ahead: tuple[Tensor, float] | None = None,
        sign: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """`evaluate`, guidance and the update that follows -> (the new x, (N, C, H, W); the
        velocity, (R, C, H, W)), both in the dtype of move.origin.

        2 launches, and 7 a block. The output is not rounded before guidance and update.
        x, modulations, v: as for `evaluate`; x and v in any dtype.
        guidance, channels: as for flowturbo_kernels.guide; guidance None: one half.
        base: (R, C, H, W), added to the output: the velocity that a refiner corrects.
        ahead: (v, dt): evaluate at x + dt * v, with the first N rows of v.
        sign: of the output; -1 for a network of the opposite velocity.
        """
        both = v is None and guidance is not None
        positions = self.positions(*x.shape[-2:])
        tokens = self.x_embedder(x, v, positions, 2 if both else 1, *(ahead or ()))
        tokens, y, gate = self._trunk(tokens, modulations)
        shift, scale = modulations[-1].chunk(2, dim=-1)
        final = self.final_layer.linear
        return final_update(
            tokens, shift, scale, final.weight, final.bias, move.origin, guidance, channels,
            move.weight, base, move.velocities, move.weights, branch=y, gate=gate, sign=sign,
        )  # fmt: skip

    def positions(self, height: int, width: int) -> Tensor:
        """The positions of the patches of latents of this size, (T, D), of the weights' dtype.

        Raises ValueError for sides that are no multiples of the patch, and for another size than
        its own if pos_embed is not SiT's.
        """
        patch = self.config.patch
        if height % patch or width % patch or not (height and width):
            raise ValueError(
                f"x must have sides that are multiples of the patch {patch}, got {height} x {width}"
            )
        return self._positions.at((height // patch, width // patch), self.pos_embed[0])

    def quantize_(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> SiT:
        """Convert the matrix products of the blocks to fp8, in place, and calibrate them.

        The velocity changes by some percent; the products run at about twice the rate. Of the
        product after attention the weight is kept as well, for GPUs on which 16 bits are faster. A
        refiner is not calibrated: its layers quantise their inputs row by row.
        velocity: (x, t, y), this network with time and sign as flowturbo has them, where they are
            not its own. The calibration samples by it, see fp8.calibrate.
        """
        static = []
        for block in cast(Sequence[Block], self.blocks):
            for part, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
                for name in names:
                    layer = getattr(part, name)
                    if isinstance(layer, nn.Linear):
                        layer = Fp8Linear(layer, keep=name == "proj")
                        setattr(part, name, layer)
                    if name in ("proj", "fc2") and layer.input_scale is None:
                        static.append(layer)
        if static and not self.config.reads_velocity:
            calibrate(self.config, self.pos_embed, static, velocity or self)
        return self

    def refiner_weights(self) -> RefinerWeights:
        """The weights, not copied, as flowturbo_kernels.refiner_forward takes them, for latents of
        its own size.

        Raises ValueError for a predictor, and for a refiner in fp8.
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
            BlockWeights(*map(pair, (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2)))
            for b in cast(Sequence[Block], self.blocks)
        ]
        embed, final = pair(self.x_embedder.proj), pair(self.final_layer.linear)
        return RefinerWeights(embed, self.pos_embed[0], blocks, final, self.config.heads)

    def _in_fp8(self) -> bool:
        """Whether all blocks are quantised and calibrated."""
        return all(
            isinstance(block.attn.qkv, Fp8Linear)
            and isinstance(block.mlp.fc1, Fp8Linear)
            and all(
                isinstance(layer, Fp8Linear) and layer.input_scale is not None
                for layer in (block.attn.proj, block.mlp.fc2)
            )
            for block in cast(Sequence[Block], self.blocks)
        )

    def _trunk(self, x: Tensor, modulations: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks, without the last residual: tokens (R, T, D) -> (x, y, gate), and x + gate * y
        goes into the final layer.

        modulations: as for `evaluate`.
        """
        blocks = cast(Sequence[Block], self.blocks)
        if self._in_fp8():
            return run_blocks_fp8(blocks, x, modulations[:-1])
        return run_blocks([(block.attn, block.mlp) for block in blocks], x, modulations[:-1])

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens (N, T, p * p * out_channels) -> (N, C, height, width).

        Channels are innermost in a token. Those of a learned sigma are dropped.
        """
        p, N, C = self.config.patch, len(tokens), self.config.channels
        grid = tokens.view(N, height // p, width // p, p, p, self.config.out_channels)[..., :C]
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(N, C, height, width)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> SiT:
        """Set SiT's initial weights, in place.

        Xavier for matrix products, normal with 0.02 for embedders, zero for adaLN and the final
        layer.
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
