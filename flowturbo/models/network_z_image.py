"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .prompt_kind import Conditions, Kind, lengths_of, with_lengths


class ZImage(Kind):
    """Its network takes lists, one entry an image, and time as ours: 0 for noise."""

    sign = 1
    lengths = True
    input, time = "x", "t"

    def multiple(self, config: Any) -> int:
        return int(min(config.all_patch_size))

    def timestep(self, noise_level: Any) -> Any:
        return 1 - noise_level

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        captions = [row[:n] for row, n in zip(c["embeds"], lengths_of(c), strict=True)]
        images = list(x.unsqueeze(2).unbind(0))
        return self.output(module(images, self.timestep(noise_level), captions, return_dict=False))

    def output(self, result: Any) -> Tensor:
        return torch.stack(list(result[0])).squeeze(2)

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        # The pipeline writes its template into the lists that it is given.
        first, second = pipe.encode_prompt(
            list(texts), device, negative is not None, negative and list(negative)
        )
        encoded = with_lengths(first)
        return encoded if negative is None else encoded | with_lengths(second, "negative_")

    def refiner(self, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return {"n_layers": depth, "n_refiner_layers": 0}

    def last_layer(self, refiner: Any) -> nn.Module:
        return next(iter(refiner.all_final_layer.values())).linear

    def beside(self, recorded: Any, x: Tensor, v: Tensor) -> Any:
        if not all(isinstance(image, Tensor) for image in recorded):
            raise ValueError(
                "a refiner reads one latent an image, but the pipeline gave its transformer more: "
                "it concatenates conditions"
            )
        return list(super().beside(torch.stack(recorded).squeeze(2), x, v).unsqueeze(2).unbind(0))
