"""Images, masks and models to edit with."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import CONFIG, tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo.models.vae import Pixels

CONFIG_SHAPE = (4, 8, 8)
GREY = replace(CONFIG, channels=1)
LABELS = [1, 8, 3]


def pixel_model() -> ft.FlowModel:
    model = tiny_model(GREY)
    model.vae = Pixels()
    return model


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    grey = torch.randint(
        256, (count, 8, 8, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return grey.expand(-1, -1, -1, 3)


# Inpainting


def half(height: int = 8, width: int = 8) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, width // 2 :] = True
    return mask
