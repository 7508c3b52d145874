"""Qwen-Image."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .prompt_kind import TOKENS, Conditions, Kind, lengths_of, packed, unpacked, with_lengths


class QwenImage(Kind):
    lengths = True
    channel_axis = -1
    rescales = True

    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    def outputs(self, config: Any) -> int:
        return int(config.patch_size**2 * (config.out_channels or config.in_channels))

    def timestep(self, noise_level: Any) -> Any:
        return noise_level

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        """Rows of one length need no mask: up to two of such groups, as the halves of guidance are,
        run one after the other, as in the pipeline. With a mask, attention is slower.
        """
        lengths = lengths_of(c)
        groups = [len(list(group)) for _, group in itertools.groupby(lengths)]
        if len(groups) > 2:
            return _call(module, x, self.timestep(noise_level), c["embeds"], lengths)
        parts, first = [], 0
        for count in groups:
            rows, first = slice(first, first + count), first + count
            embeds = c["embeds"][rows, : lengths[rows][0]]
            parts.append(_call(module, x[rows], self.timestep(noise_level[rows]), embeds, None))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        encoded: dict[str, Tensor] = {}
        for prefix, prompts in (("", texts), ("negative_", negative)):
            if prompts is None:
                continue
            embeds, mask = pipe.encode_prompt(prompts, device, max_sequence_length=TOKENS)
            lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
            rows = [row[: int(length)] for row, length in zip(embeds, lengths, strict=True)]
            encoded |= with_lengths(rows, prefix)
        return encoded

    def rescale(self, guided: Tensor, conditional: Tensor) -> Tensor:
        rescaled = self.rescale_latents(packed(guided), packed(conditional))
        return unpacked(rescaled, *guided.shape[2:])

    def rescale_latents(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Every token of the guided velocity, with the norm of the conditional one."""
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _call(
    module: Any, x: Tensor, time: Tensor, embeds: Tensor, lengths: list[int] | None
) -> Tensor:
    """lengths: of the prompts, where they differ."""
    N, _, H, W = x.shape
    mask = None
    if lengths is not None:
        embeds = embeds[:, : max(lengths)]
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=x.device)
        for row, length in zip(mask, lengths, strict=True):
            row[:length] = True  # not copied from the host, which can't be captured
    y = module(
        hidden_states=packed(x),
        timestep=time.to(x.dtype),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, H // 2, W // 2)]] * N,
        return_dict=False,
    )[0]
    return unpacked(y, H, W)
