"""FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .prompt_kind import Conditions, GuidanceStyle, Kind, packed, unpacked


class Flux(Kind):
    reads = ("embeds", "pooled")
    channel_axis = -1

    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    def timestep(self, noise_level: Any) -> Any:
        return noise_level

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        _, _, H, W = x.shape
        positions = torch.zeros(H // 2, W // 2, 3, device=x.device, dtype=x.dtype)
        positions[..., 1] = torch.arange(H // 2, device=x.device, dtype=x.dtype)[:, None]
        positions[..., 2] = torch.arange(W // 2, device=x.device, dtype=x.dtype)
        y = module(
            hidden_states=packed(x),
            timestep=noise_level.to(x.dtype),
            guidance=c.get("embedded_guidance"),
            pooled_projections=c["pooled"],
            encoder_hidden_states=c["embeds"],
            txt_ids=torch.zeros(c["embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=positions.view(-1, 3),
            return_dict=False,
        )[0]
        return unpacked(y, H, W)

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        encoded: dict[str, Tensor] = {}
        for prefix, prompts in (("", texts), ("negative_", negative)):
            if prompts is not None:
                embeds, pooled, _ = pipe.encode_prompt(prompts, None, device=device)
                encoded |= {f"{prefix}embeds": embeds, f"{prefix}pooled": pooled}
        return encoded

    def guidance(self, module: Any, pipe: Any = None) -> GuidanceStyle:
        return "embedded" if module.config.guidance_embeds else "none"

    def refiner(self, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return {"num_layers": depth, "num_single_layers": 0}
