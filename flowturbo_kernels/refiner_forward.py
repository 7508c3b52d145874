"""A whole refiner evaluation, from x and a velocity to the updated x and the refined velocity, in
few launches; and the loop over a DiT's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from .adaln import adaln_modulate, gated_residual_adaln
from .attention import attention
from .final_update import final_update
from .linear import linear
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


def run_blocks(
    blocks: Iterable[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
    x: Tensor,
    modulations: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of a DiT, without the last residual, which `final_update` adds.

    blocks: attention and MLP of each, (R, T, D) -> (R, T, D); x (R, T, D); modulations: (R, 6D) for
    each block, or (N + 1, 6D) as in `adaln_modulate` -> (x, y, gate), of which x + gate * y goes
    on. Each branch ends with the residual and the adaLN of what follows, in one operation.
    """
    chunks = [m.chunk(6, dim=-1) for m in modulations]
    h = adaln_modulate(x, chunks[0][0], chunks[0][1])
    for (attend, mlp), (_, _, gate_msa, shift_mlp, scale_mlp, gate_mlp), following in zip(
        blocks, chunks, [*chunks[1:], None], strict=True
    ):
        x, h = gated_residual_adaln(x, attend(h), gate_msa, shift_mlp, scale_mlp)
        y = mlp(h)
        if following is not None:
            x, h = gated_residual_adaln(x, y, gate_mlp, following[0], following[1])
    return x, y, gate_mlp


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
    layer; with guidance N + 1 rows will do, the null class's last. x (N, C, H, W); v (R, C, H, W),
    which the refiner reads, R = 2N with guidance, conditional rows first, or N with guidance None;
    origin (N, C, H, W), which is updated, x if None; base (R, C, H, W), to which the offset is
    added, v if None; the rest as in `guided_update` -> (the updated origin, the refined velocity),
    both in origin's dtype. 2 + 7 * blocks launches: x is read once for both halves, no kernel only
    concatenates or converts, and the offset is not rounded.
    """
    blocks = [_branches(block, weights.heads) for block in weights.blocks]
    tokens = patch_embed(x, *weights.embed, v, weights.positions)
    tokens, y, gate = run_blocks(blocks, tokens, modulations[:-1])
    shift, scale = modulations[-1].chunk(2, dim=-1)
    origin, base = x if origin is None else origin, v if base is None else base
    layer = tokens, shift, scale, *weights.final
    return final_update(
        *layer, origin, guidance, channels, weight_v, base, velocities, velocity_weights,
        branch=y, gate=gate,
    )  # fmt: skip


def _branches(
    block: BlockWeights, heads: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    def attend(h: Tensor) -> Tensor:
        R, T, D = h.shape
        qkv = linear(h, *block.qkv).view(R, T, 3, heads, D // heads)
        return linear(attention(qkv), *block.proj)

    def mlp(h: Tensor) -> Tensor:
        return linear(linear(h, *block.fc1, "gelu_tanh"), *block.fc2)

    return attend, mlp
