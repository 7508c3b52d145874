"""`flowturbo edit` and `flowturbo inpaint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from ..sampling.edit import edit, image_size, inpaint
from ..storage.images import box_mask, read_image, read_mask, read_npz, read_transparency
from .options import ModelFlags, load_model
from .output import check_out, summary_line, write_images


@dataclass(frozen=True)
class Edit(ModelFlags):
    """Change images towards classes: each is mixed with noise and sampled from there."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files (cropped to squares of the model's size, on white where transparent), or one .npz
    as sample writes it.
    """
    labels: tuple[int, ...] = ()
    """What to make of them: one class number, or one an image. A model that reads text takes
    --prompts likewise.
    """
    strength: float = 0.6
    """Above 0, at most 1: how much of the image is forgotten."""
    out: Path = Path("edited.png")
    """A grid with the images above and what became of them below (.png), or an .npz as sample
    writes it.
    """


@dataclass(frozen=True)
class Inpaint(Edit):
    """Make a part of images anew and keep the rest: the part in a mask, in a box, or where an image
    is transparent.
    """

    strength: float = 1.0
    """Above 0, at most 1: how much of the part is forgotten."""
    mask: Path | None = None
    """An image file of the images' size, bright (or transparent) where they are to be made anew."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the part, as shares of width and height."""
    out: Path = Path("inpainted.png")
    """A grid with the images above and what became of them below (.png), or an .npz as sample
    writes it.
    """


def run_edit(settings: Edit) -> str:
    check_out(settings.out)
    if not settings.images or not (settings.labels or settings.prompts):
        raise ValueError("images and labels (or prompts) must name at least one each")
    model, plan, options = load_model(settings)
    given: Sequence[Any] = settings.prompts or settings.labels
    before = _images(settings.images, image_size(model))
    chosen: dict[str, Any] = {"strength": settings.strength, **options}
    if isinstance(settings, Inpaint):
        made = inpaint(model, plan, before, _mask(settings, before), given, **chosen)
    else:
        made = edit(model, plan, before, given, **chosen)
    labels = given if len(given) == len(made) else list(given) * len(made)
    write_images(settings.out, made, labels, torch.from_numpy(before).expand(len(made), -1, -1, -1))
    return summary_line(settings.out, len(made), plan)


def _images(paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    if any(path.suffix == ".npz" for path in paths):
        if len(paths) > 1:
            raise ValueError(
                f"images must be image files or one .npz, got {len(paths)} files with an .npz "
                "among them"
            )
        return read_npz(paths[0])
    return np.stack([read_image(path, size[0]) for path in paths])


def _mask(settings: Inpaint, images: np.ndarray) -> np.ndarray:
    height, width = images.shape[1:3]
    if settings.mask is not None and settings.box is not None:
        raise ValueError("give mask or box, not both")
    if settings.box is not None:
        return box_mask(settings.box, height, width)
    files = [path for path in settings.images if path.suffix != ".npz"]
    if settings.mask is not None:
        if not files:
            raise ValueError("mask must go with image files; for an .npz give box")
        return np.stack([read_mask(settings.mask, height, path) for path in files])
    masks = [read_transparency(path, height) for path in files]
    if not masks or any(mask is None for mask in masks):
        raise ValueError(
            "mask or box must say what to make anew, where images are not transparent there"
        )
    return np.stack([mask for mask in masks if mask is not None])
