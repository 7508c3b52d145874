"""Fused kernels inside a diffusers autoencoder.

Modules of one instance are exchanged; no class is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .hooks import as_made
from .vae_decoder import FusedDecoder, GroupNormSiLU, fits


def fuse(network: nn.Module) -> int:
    """Fuse every GroupNorm of an AutoencoderKL that a SiLU follows -> how many; and its decoder, if
    it is as FusedDecoder knows it.

    The network is changed in place, to channels_last; its state dict keeps its keys.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = 0
    for module in network.modules():
        block: Any = module
        # Residual blocks have this attribute, and in an autoencoder it is None.
        if getattr(block, "time_emb_proj", block) is not None:
            continue
        if _are_fit(block.nonlinearity, block.norm1, block.norm2):
            block.norm1, block.norm2, block.nonlinearity = (
                GroupNormSiLU(block.norm1),
                GroupNormSiLU(block.norm2),
                nn.Identity(),
            )
            count += 2
    for part in (getattr(network, "encoder", None), getattr(network, "decoder", None)):
        norm: Any = getattr(part, "conv_norm_out", None)
        if _are_fit(getattr(part, "conv_act", None), norm):
            part.conv_norm_out, part.conv_act = GroupNormSiLU(norm), nn.Identity()  # type: ignore[union-attr]
            count += 1
    decoder = getattr(network, "decoder", None)
    if isinstance(decoder, nn.Module) and _is_known(decoder):
        network.decoder = FusedDecoder(decoder)
    return count


def _is_known(decoder: nn.Module) -> bool:
    return (
        not isinstance(decoder, FusedDecoder) and as_made(decoder, type(decoder)) and fits(decoder)
    )


def _are_fit(activation: Any, *norms: Any) -> bool:
    return isinstance(activation, nn.SiLU) and all(
        type(norm) is nn.GroupNorm and norm.affine for norm in norms
    )
