"""Small class-conditional models of several sizes, and the paper's steps on them by the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import torch
from other_sizes import second_reading
from scipy.fft import dctn, idctn
from tiny import CONFIG, random_sit
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime import rng

LABELS = [3, 7, 1]
BOTH = replace(CONFIG, sides=(4,))
GREY = replace(BOTH, channels=1)


def model_of(config=BOTH, dtype=torch.float32, vae: Any = None, **options: Any) -> ft.FlowModel:
    """A model and a refiner that were trained at 8 x 8 and 4 x 4, as they say."""
    refiner = random_sit(replace(config.refiner(), sides=config.sides), 1)
    return ft.load(random_sit(config, 0), refiner, vae, device="cpu", dtype=dtype, **options)


def noise(count: int = 3, side: int = 8, seed: int = 0, channels: int = 4) -> Tensor:
    return rng.noise((channels, side, side), seed, range(count)).double()


def low_frequencies(x: Tensor, side: int) -> Tensor:
    """By scipy's transforms."""
    spectrum = dctn(x.numpy(), axes=(2, 3), norm="ortho")[..., :side, :side]
    return torch.from_numpy(idctn(spectrum, axes=(2, 3), norm="ortho"))


class Program:
    """The paper's steps by the oracle, with guidance of a scale (1: none) of three channels."""

    def __init__(self, model: ft.FlowModel, labels: list[int], scale: float) -> None:
        self.model, self.scale = model, scale
        y = torch.tensor(labels)
        self.y = y if scale == 1 else torch.cat([y, torch.full_like(y, 10)])

    def velocity(self, x: Tensor, t: float, v: Tensor | None = None) -> Tensor:
        network: Any = self.model.predictor if v is None else self.model.refiner
        rows = x if self.scale == 1 else torch.cat([x, x])
        out = second_reading(network, rows, torch.full_like(rows[:, 0, 0, 0], t), self.y, v)
        return out if self.scale == 1 else oracle.guide(out, self.scale, 3)

    def run(self, x: Tensor, letters: str, grid: list[float]) -> tuple[Tensor, Tensor]:
        cache: Any = None
        for letter, t, t_next in zip(letters, grid[:-1], grid[1:], strict=True):
            if letter == "H":
                x, cache = oracle.heun_step(self.velocity, x, t, t_next)
            elif letter == "P":
                x, cache = oracle.pseudo_corrector_step(self.velocity, x, t, t_next, cache)
            else:
                x, cache = oracle.refiner_step(self.velocity, x, t, t_next, cache)
        return x, cache[: len(x)]
