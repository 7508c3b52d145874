"""2-RF: a Stable Diffusion 1.5 UNet that was trained as a flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .prompt_kind import Conditions, Kind


class TwoRF(Kind):
    sign = 1
    input, time = "sample", "timestep"

    def channels(self, config: Any) -> int:
        return int(config.out_channels or config.in_channels)

    def multiple(self, config: Any) -> int:
        return 2 ** (len(config.block_out_channels) - 1)

    def sides(self, config: Any) -> tuple[int, int]:
        return config.sample_size, config.sample_size

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        return module(
            x,
            self.timestep(noise_level),
            encoder_hidden_states=c["embeds"],
            return_dict=False,
        )[0]

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        embeds, second = pipe.encode_prompt(texts, device, 1, negative is not None, negative)
        return {"embeds": embeds} | ({} if negative is None else {"negative_embeds": second})

    def refiner(self, config: dict[str, Any], depth: int) -> dict[str, Any]:
        """The first width is halved in the first half of the levels and kept in the others."""
        widths = config["block_out_channels"]
        levels, width = len(widths), widths[0]
        return {
            "layers_per_block": depth,
            "block_out_channels": [width // 2 if i < levels // 2 else width for i in range(levels)],
        }

    def last_layer(self, refiner: Any) -> nn.Module:
        return refiner.conv_out
