"""Refiners for small pipelines."""

from __future__ import annotations

from typing import Any

import torch

import flowturbo as ft


def refiner_of(pipe: Any, seed: int = 11) -> Any:
    refiner = ft.refiner_for(pipe.transformer)
    generator = torch.Generator().manual_seed(seed)
    for parameter in refiner.parameters():
        scale = 0.02 if parameter.ndim == 1 else 0.2 / parameter[0].numel() ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return refiner.requires_grad_(False).eval()
