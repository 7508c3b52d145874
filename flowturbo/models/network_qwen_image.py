"""Qwen-Image."""

from __future__ import annotations

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
        """Rows of one length at a time: so they need no mask, with which attention is slower, and
        no row depends on the lengths of others.
        """
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths_of(c)):
            groups.setdefault(length, []).append(row)
        outputs: dict[int, Tensor] = {}
        for length, rows in groups.items():
            embeds = _chosen(c["embeds"], rows)[:, :length]
            y = _call(module, _chosen(x, rows), self.timestep(_chosen(noise_level, rows)), embeds)
            outputs |= {row: y[i : i + 1] for i, row in enumerate(rows)}
        return y if len(groups) == 1 else torch.cat([outputs[row] for row in range(len(x))])

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


def _chosen(values: Tensor, rows: list[int]) -> Tensor:
    """These rows, without an index on the device, whose copy can't be captured."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return values[rows[0] : rows[-1] + 1]
    return torch.cat([values[row : row + 1] for row in rows])


def _call(module: Any, x: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
    N, _, H, W = x.shape
    y = module(
        hidden_states=packed(x),
        timestep=time.to(x.dtype),
        encoder_hidden_states=embeds,
        img_shapes=[[(1, H // 2, W // 2)]] * N,
        return_dict=False,
    )[0]
    return unpacked(y, H, W)
