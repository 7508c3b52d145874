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
    """Convert a published checkpoint into a checked safetensors file.

    It holds the model's weights alone, with what is needed to load them.
    """

    source: tyro.conf.Positional[Path]
    """The .pt, .pth or .safetensors file."""
    target: tyro.conf.Positional[Path]
    """The .safetensors file to write."""
    role: Literal["predictor", "refiner"] = "predictor"
    """What the checkpoint is."""
    heads: int | None = None
    """Number of attention heads, for checkpoints whose width is not a published one."""
    convention: Literal["auto", "sit", "repa"] = "auto"
    """"repa" for checkpoints whose time runs backwards."""
    vae: str | None = None
    """Folder or hub name of the VAE for the model's latents, to be named in the file."""
    null_class: int | Literal["auto", "none"] = "auto"
    """Row of the label table that guidance takes for no label; "none" if there is none.
    Default: as the source says, else the last row.
    """
    assume_velocity: bool = False
    """Take the model for a velocity on the straight path even if its file says that it is none."""
    dtype: Dtype | None = None
    """Data type of the weights. Default: as in the source."""


def run_convert(settings: Convert) -> Path:
    checkpoint.convert(
        settings.source,
        settings.target,
        role=settings.role,
        heads=settings.heads,
        convention=settings.convention,
        vae=settings.vae,
        dtype=dtype_of(settings.dtype),
        null_class=None if settings.null_class == "none" else settings.null_class,
        assume_velocity=settings.assume_velocity,
    )
    return settings.target
