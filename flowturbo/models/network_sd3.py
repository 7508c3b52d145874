"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .prompt_kind import Conditions, Kind


class SD3(Kind):
    reads = ("embeds", "pooled")

    def multiple(self, config: Any) -> int:
        return int(config.patch_size)

    def sides(self, config: Any) -> tuple[int, int]:
        return config.sample_size, config.sample_size

    def longest(self, config: Any) -> int:
        return int(config.patch_size * config.pos_embed_max_size)

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        return module(
            hidden_states=x,
            timestep=self.timestep(noise_level),
            encoder_hidden_states=c["embeds"],
            pooled_projections=c["pooled"],
            return_dict=False,
        )[0]

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        encodings = pipe.encode_prompt(
            texts,
            None,
            None,
            device=device,
            negative_prompt=negative,
            do_classifier_free_guidance=negative is not None,
        )
        names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
        return {
            name: value
            for name, value in zip(names, encodings, strict=True)
            if value is not None and (negative is not None or not name.startswith("negative"))
        }

    def refiner(self, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return {"num_layers": depth, "dual_attention_layers": ()}
