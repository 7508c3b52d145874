"""`flowturbo convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..models import checkpoint
from ..runtime.device import Dtype, dtype_of


@dataclass(frozen=True)
class Convert:
    """Turn a published checkpoint into a checked safetensors file with only the weights that
    sample.
    """

    source: tyro.conf.Positional[Path]
    """The .pt, .pth or .safetensors file."""
    target: tyro.conf.Positional[Path]
    """The .safetensors file to write."""
    role: Literal["predictor", "refiner"] = "predictor"
    """What the source is."""
    heads: int | None = None
    """Attention heads, for checkpoints of an unpublished width."""
    convention: Literal["auto", "sit", "repa"] = "auto"
    """"repa" for checkpoints whose time runs backwards."""
    vae: str | None = None
    """Name of the VAE that decodes its images, written into the file."""
    dtype: Dtype | None = None
    """Left out: as in the source."""


def _convert(settings: Convert) -> Path:
    checkpoint.convert(
        settings.source,
        settings.target,
        role=settings.role,
        heads=settings.heads,
        convention=settings.convention,
        vae=settings.vae,
        dtype=dtype_of(settings.dtype),
    )
    return settings.target
