"""SiT networks with random weights, for timings."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from .sit import SIT_CONFIGS, SiT, SiTConfig


def untrained(name: str, image_size: int, device: torch.device) -> tuple[SiT, SiT]:
    """A predictor of a published size, and its refiner, with random weights.

    name: such as "SiT-XL/2". image_size: in pixels.
    No weight is zero, since products with zeros may take less power and time. Raises ValueError for
    an image size that the patches do not divide.
    """
    config = SIT_CONFIGS[name]
    if image_size < 8 * config.patch or image_size % (8 * config.patch):
        raise ValueError(
            f"image_size must be a multiple of {8 * config.patch} for {name}, got {image_size}"
        )
    config = SiTConfig(**{**asdict(config), "side": image_size // 8})
    return filled(config, device, 0), filled(config.refiner(), device, 1)


def filled(config: SiTConfig, device: torch.device, seed: int) -> SiT:
    """A SiT with seeded random weights, small enough to keep activations bounded."""
    with torch.device(device):
        model = SiT(config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            nn.init.normal_(
                parameter, std=0.5 / fan**0.5 if parameter.ndim > 1 else 0.02, generator=generator
            )
    return model.requires_grad_(False).eval()
