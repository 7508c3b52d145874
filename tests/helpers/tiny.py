"""Small models with seeded random weights, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch

import flowturbo as ft
from flowturbo.models.sit import SiT, SiTConfig

CONFIG = SiTConfig(
    hidden=48, depth=2, heads=2, patch=2, side=8, channels=4, num_classes=10, learned_sigma=False
)
HEAD_DIM_72 = replace(CONFIG, hidden=72, heads=1)


def random_sit(config: SiTConfig, seed: int) -> SiT:
    """A SiT none of whose weights is zero, so that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    model = SiT(config)
    for parameter in model.parameters():
        scale = 0.02 if parameter.ndim == 1 else 0.7 / parameter[0].numel() ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False).eval()


def tiny_model(
    config: SiTConfig = CONFIG,
    *,
    seed: int = 0,
    refiner: bool = True,
    dtype: torch.dtype = torch.float32,
) -> ft.FlowModel:
    """A predictor and, if asked, its refiner, on the CPU."""
    side = random_sit(config.refiner(), seed + 1) if refiner else None
    return ft.load(random_sit(config, seed), side, device="cpu", dtype=dtype)
