"""Wan 2.1 and 2.2, text to video."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .prompt_kind import TOKENS, Conditions, Kind


class Wan(Kind):
    """Latents (N, C, T, H, W)."""

    spatial = 3

    def multiple(self, config: Any) -> int:
        return int(max(config.patch_size[1:]))

    def sides(self, config: Any) -> tuple[int, int]:
        return 60, 104

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        return module(
            hidden_states=x,
            timestep=self.timestep(noise_level),
            encoder_hidden_states=c["embeds"],
            return_dict=False,
        )[0]

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        embeds, second = pipe.encode_prompt(
            texts, negative, negative is not None, max_sequence_length=TOKENS, device=device
        )
        return {"embeds": embeds} | ({} if negative is None else {"negative_embeds": second})
