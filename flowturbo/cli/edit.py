"""`flowturbo edit` and `flowturbo inpaint`: images in, images out."""

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
    """Edit images towards a class or prompt (SDEdit).

    Each image is mixed with noise and sampled from there.
    """

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, cropped to squares of the model's size, with white where they are transparent.
    Or one .npz from `flowturbo sample`.
    """
    labels: tuple[int | str, ...] = ()
    """Target class, a number or name: one for all images, or one per image.
    Text-to-image models take --prompts instead.
    """
    strength: float = 0.6
    """How much of an image is replaced by noise: above 0, at most 1."""
    out: Path = Path("edited.png")
    """A .png with the images above their edited versions, or an .npz like `flowturbo sample`'s."""


@dataclass(frozen=True)
class Inpaint(Edit):
    """Replace a region of images and keep the rest.

    The region is given by --mask, by --box, or by the transparent pixels of the images.
    """

    strength: float = 1.0
    """How much of the region is replaced by noise: above 0, at most 1."""
    mask: Path | None = None
    """An image file of the images' size, bright or transparent in the region to replace."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the region, as fractions of width and height."""
    out: Path = Path("inpainted.png")
    """A .png with the images above their new versions, or an .npz like `flowturbo sample`'s."""


def run_edit(settings: Edit) -> str:
    """Edit or inpaint, by the type of the settings; returns a summary line."""
    check_out(settings.out)
    if not settings.images or not (settings.labels or settings.prompts):
        raise ValueError("images and labels (or prompts) must name at least one each")
    model, plan, options = load_model(settings)
    targets: Sequence[Any] = settings.prompts or model.numbered(settings.labels)
    before = _images(settings.images, image_size(model))
    options["strength"] = settings.strength
    if isinstance(settings, Inpaint):
        after = inpaint(model, plan, before, _mask(settings, before), targets, **options)
    else:
        after = edit(model, plan, before, targets, **options)
    count = len(after)
    labels = targets if len(targets) == count else list(targets) * count
    shown = torch.from_numpy(before).expand(count, -1, -1, -1)
    write_images(settings.out, after, labels, model.class_names, shown)
    return summary_line(settings.out, count, plan)


def _images(paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """The images of an .npz, or of files, (N, height, width, 3) uint8."""
    if any(path.suffix.lower() == ".npz" for path in paths):
        if len(paths) > 1:
            raise ValueError(
                f"images must be image files or one .npz, got {len(paths)} files with an .npz "
                "among them"
            )
        return read_npz(paths[0])
    return np.stack([read_image(path, size[0]) for path in paths])


def _mask(settings: Inpaint, images: np.ndarray) -> np.ndarray:
    """The region to replace, (height, width), or (N, height, width) with one per image."""
    height, width = images.shape[1:3]
    if settings.mask is not None and settings.box is not None:
        raise ValueError("give mask or box, not both")
    if settings.box is not None:
        return box_mask(settings.box, height, width)
    files = [path for path in settings.images if path.suffix.lower() != ".npz"]
    if settings.mask is not None:
        if not files:
            raise ValueError("mask must go with image files; for an .npz give box")
        return np.stack([read_mask(settings.mask, height, path) for path in files])
    masks = [read_transparency(path, height) for path in files]
    if not masks or any(mask is None for mask in masks):
        raise ValueError(
            "mask or box must be given, unless the images are transparent in the region to replace"
        )
    return np.stack([mask for mask in masks if mask is not None])
