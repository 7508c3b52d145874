"""`flowturbo convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ..models import checkpoint
from ..models.notes import Notes
from ..runtime.device import Dtype, dtype_of
from ..solver.plan_file import read_contents
from ..solver.stages import load_plan
from ..storage.text import TextError, argument, read_lines


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
    class_names: Path | None = None
    """A text file with the name of a class in each line, of class 0, 1, ..., for the file to hold.
    Default: those that the source holds.
    """
    plans: tuple[str, ...] = ()
    """Plans for the file to hold, each as name=file.json, beside those that the source holds.
    `--plan NAME` takes them, and that named "default" is what commands take without --plan.
    With --role refiner: plans for both networks, which come before those of the predictor's file.
    """
    guidance: float | None = None
    """Scale of guidance for the file to recommend. Default: what the source does."""
    license: str | None = None
    """Licence of the weights for the file to name, in a line. Default: what the source says."""


def run_convert(settings: Convert) -> Path:
    names = None if settings.class_names is None else class_names_in(settings.class_names)
    notes = Notes(names, plans_in(settings.plans), settings.guidance, settings.license)
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
        notes=notes,
    )
    return settings.target


def class_names_in(path: Path) -> list[str]:
    """The lines of a text file; ValueError, naming the file, if it can't be read."""
    try:
        return [line.strip() for line in read_lines(path)]
    except TextError as error:
        raise ValueError(f"class_names {error}") from None


def plans_in(words: Sequence[str]) -> dict[str, Any]:
    """Words such as "fast=fast.json" -> what the files hold, by name."""
    plans: dict[str, Any] = {}
    for word in map(argument, words):
        name, equals, file = word.partition("=")
        if not equals or not file.endswith(".json"):
            raise ValueError(f"plans must look like 'fast=fast.json', got {word!r}")
        if name in plans:
            raise ValueError(f"plans must have different names, got {name!r} twice")
        load_plan(file)  # which names the file if it is none
        plans[name] = read_contents(Path(file))
    return plans
