"""The nearest training picture: a model that has memorised makes pictures that are too near."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.latents import Latents

_ROWS = 256


class Nearest:
    """Distances from pictures to the nearest of a data set's, mirrored ones included.

    data: latents (N, C, H, W) that are pixels in [-1, 1]; its mirrored pictures, or if it has none
    the mirror images of its pictures.
    """

    def __init__(self, data: Latents) -> None:
        mirrored = data.mean.flip(3) if data.latents_flipped is None else data.latents_flipped
        self.pictures = torch.cat([data.mean, mirrored]).flatten(1).float()
        self.squares = self.pictures.double().square().sum(dim=1).float()

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """latents (N, C, H, W), clipped to [-1, 1] -> RMS per value, (N,), float64.

        The nearest one is found by products in float32, its distance is then computed in float64.
        So where two are equally near up to rounding, either may be taken.
        """
        distances = []
        for x in latents.detach().cpu().float().clamp(-1, 1).flatten(1).split(_ROWS):
            # Less |x|^2, which is the same for all.
            nearest = (self.squares - 2 * x @ self.pictures.T).argmin(dim=1)
            difference = x.double() - self.pictures[nearest].double()
            distances.append(difference.square().mean(dim=1).sqrt())
        return torch.cat(distances)
