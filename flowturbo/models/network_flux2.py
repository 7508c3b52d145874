"""FLUX.2, dev and Klein."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .prompt_kind import Conditions, GuidanceStyle, Kind


class Flux2(Kind):
    """A latent is one token of the network, 2 x 2 of the VAE's own: 16 pixels of a side."""

    factor = 16
    channel_axis = -1

    def multiple(self, config: Any) -> int:
        return 1

    def timestep(self, noise_level: Any) -> Any:
        return noise_level

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        _, _, H, W = x.shape
        words = torch.zeros(c["embeds"].shape[1], 4, dtype=torch.float32, device=x.device)
        words[:, 3] = torch.arange(len(words), device=x.device)
        positions = torch.zeros(H, W, 4, dtype=torch.float32, device=x.device)
        positions[..., 1] = torch.arange(H, device=x.device)[:, None]
        positions[..., 2] = torch.arange(W, device=x.device)
        y = module(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=self.timestep(noise_level).to(x.dtype),
            guidance=c.get("embedded_guidance"),
            encoder_hidden_states=c["embeds"],
            txt_ids=words,
            img_ids=positions.view(-1, 4),
            return_dict=False,
        )[0]
        return y.transpose(1, 2).unflatten(2, (H, W))

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        encoded = {"embeds": pipe.encode_prompt(texts, device=device)[0]}
        if negative is not None:
            encoded["negative_embeds"] = pipe.encode_prompt(negative, device=device)[0]
        return encoded

    def guidance(self, module: Any, pipe: Any = None) -> GuidanceStyle:
        if module.config.guidance_embeds:
            return "embedded"
        distilled = getattr(getattr(pipe, "config", None), "is_distilled", False)
        return "none" if distilled else "halves"

    def shift(self, scheduler: Any, tokens: int) -> float | None:
        """As its pipelines shift the grid of ten steps; with other numbers it differs a little."""
        if not getattr(scheduler, "config", {}).get("use_dynamic_shifting"):
            return None
        slope, start = (8.73809524e-05, 1.89833333) if tokens <= 4300 else (0.00016927, 0.45666666)
        return math.exp(slope * tokens + start)

    def refiner(self, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return {"num_layers": depth, "num_single_layers": 0}
