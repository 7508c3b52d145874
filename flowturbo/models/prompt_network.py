"""Networks of diffusers as predictors and refiners, in our time and sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .prompt_kind import Conditions, original
from .prompt_kinds import kind_of


class PromptNetwork(nn.Module):
    """A diffusers network as a predictor or refiner, in our time and sign.

    x (N, C, H, W), or (N, C, T, H, W) for videos, t (N,), conditions, v like x -> like x.
    channels: of the latents.
    multiple: the sides of the latents must be multiples of this.
    sides: height and width of the latents by default.
    longest: the longest side of the latents.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.kind = module, kind_of(module)
        config = original(module).config
        self.channels = self.kind.channels(config)
        self.multiple = self.kind.multiple(config)
        self.sides = self.kind.sides(config)
        self.longest = self.kind.longest(config)

    def forward(self, x: Tensor, t: Tensor, y: Any, v: Tensor | None = None) -> Tensor:
        both = x if v is None else torch.cat([x, v], dim=1)
        output = self.kind.call(self.module, both, 1 - t, y)
        # A refiner of Z-Image's class makes as many channels as it reads.
        return self.kind.sign * output[:, : x.shape[1]]

    def at(self, t: float) -> Callable[..., Tensor]:
        """What answers at time t, which is the same for all rows."""
        return self


class TwoExperts(PromptNetwork):
    """Wan 2.2's two networks: the second one takes over below a noise level.

    boundary: noise levels from it on are the first network's.
    """

    def __init__(self, first: nn.Module, second: nn.Module, boundary: float) -> None:
        super().__init__(first)
        self.low, self.boundary = PromptNetwork(second), boundary

    def high(self, x: Tensor, t: Tensor, y: Any, v: Tensor | None = None) -> Tensor:
        return super().forward(x, t, y, v)

    def at(self, t: float) -> Callable[..., Tensor]:
        return self.high if 1 - t >= self.boundary else self.low

    def forward(self, x: Tensor, t: Tensor, y: Conditions, v: Tensor | None = None) -> Tensor:
        """As `PromptNetwork`; rows may be at times of both."""
        high = 1 - t >= self.boundary
        out = torch.empty_like(x)
        for rows, network in ((high, self.high), (~high, self.low)):
            if rows.any():
                own = {name: value[rows.to(value.device)] for name, value in y.items()}
                out[rows] = network(x[rows], t[rows], own, None if v is None else v[rows])
        return out


def config_of(module: Any) -> dict[str, Any]:
    """The configuration of a diffusers network, without file names."""
    config = original(module).config
    return {key: value for key, value in config.items() if not key.startswith("_")}
