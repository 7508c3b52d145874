"""A whole refiner evaluation, from x and a velocity to the updated x and the refined velocity, in
few launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .adaln import adaln_modulate, gated_residual_adaln
from .attention import attention
from .final_update import final_update
from .linear import linear, linear_gated_residual
from .patch_embed import patch_embed


class Linear(NamedTuple):
    """weight (N, K), bias (N,)."""

    weight: Tensor
    bias: Tensor


class BlockWeights(NamedTuple):
    """The matrix products of a DiT block of hidden size D: qkv (3D, D), proj (D, D), fc1 (4D, D),
    fc2 (D, 4D).
    """

    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear


class RefinerWeights(NamedTuple):
    """A refiner without its conditioning. embed: weight (D, 2C, p, p); positions (T, D); final:
    weight (p * p * C or twice, D).
    """

    embed: Linear
    positions: Tensor
    blocks: Sequence[BlockWeights]
    final: Linear
    heads: int


def refiner_forward(
    weights: RefinerWeights,
    modulations: Sequence[Tensor],
    x: Tensor,
    v: Tensor,
    guidance: float | Tensor | None,
    channels: int,
    weight_v: float,
    origin: Tensor | None = None,
    base: Tensor | None = None,
    velocities: Sequence[Tensor] = (),
    velocity_weights: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Refine a velocity and update x with it: one evaluation of a refiner step (paper section 3.2).

    modulations: adaLN's, computed beforehand, since they depend on times and labels alone: (R, 6D)
    for each block, shift, scale and gate of attention, then of the MLP, and (R, 2D) for the final
    layer. x (N, C, H, W); v (R, C, H, W), which the refiner reads, R = 2N with guidance,
    conditional rows first, or N with guidance None; origin (N, C, H, W), which is updated, x if
    None; base (R, C, H, W), to which the offset is added, v if None; the rest as in `guided_update`
    -> (the updated origin, the refined velocity), both in origin's dtype. 2 + 7 * blocks launches:
    x is read once for both halves, and no kernel only concatenates or converts.
    """
    tokens = patch_embed(x, *weights.embed, v, weights.positions)
    B, T, D = tokens.shape
    for block, modulation in zip(weights.blocks, modulations[:-1], strict=True):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        h = adaln_modulate(tokens, shift_msa, scale_msa)
        qkv = linear(h, *block.qkv).view(B, T, 3, weights.heads, D // weights.heads)
        y = linear(attention(qkv), *block.proj)
        tokens, h = gated_residual_adaln(tokens, y, gate_msa, shift_mlp, scale_mlp)
        tokens = linear_gated_residual(
            linear(h, *block.fc1, "gelu_tanh"), *block.fc2, tokens, gate_mlp
        )
    shift, scale = modulations[-1].chunk(2, dim=-1)
    origin, base = x if origin is None else origin, v if base is None else base
    layer = tokens, shift, scale, *weights.final
    return final_update(
        *layer, origin, guidance, channels, weight_v, base, velocities, velocity_weights
    )
