"""Output files of commands: a labelled grid, a single image or an .npz."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from ..storage.files import atomic_write
from ..storage.image_shards import CLASS_NAMES

_MARGIN, _TEXT = 6, 18
_SMALLEST = 96


def labelled_grid(images: Tensor, labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Images (N, height, width, 3) uint8 as one picture, each above its label.

    Images under 96 pixels are enlarged by a whole factor. Labels wider than an image are truncated.
    """
    pixels: np.ndarray = images.cpu().numpy()
    if len(pixels) != len(labels):
        raise ValueError(f"labels must be {len(pixels)}, one an image, got {len(labels)}")
    height, width = pixels.shape[1:3]
    factor = max(1, math.ceil(_SMALLEST / min(height, width)))
    columns = columns or min(len(pixels), max(5, math.isqrt(len(pixels) - 1) + 1))
    rows = math.ceil(len(pixels) / columns)
    cell = (width * factor + _MARGIN, height * factor + _MARGIN + _TEXT)
    picture = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        x, y = (i % columns) * cell[0] + _MARGIN, (i // columns) * cell[1] + _MARGIN
        enlarged = Image.fromarray(image).resize(
            (width * factor, height * factor), Image.Resampling.NEAREST
        )
        picture.paste(enlarged, (x, y))
        text = _truncated(label, lambda text: font.getlength(text) <= width * factor)
        draw.text(
            (x + width * factor / 2, y + height * factor + 1),
            text,
            fill="black",
            font=font,
            anchor="ma",
        )
    return picture


def _truncated(label: str, fits: Callable[[str], bool]) -> str:
    """The label in one line, shortened with dots until it fits."""
    label = " ".join(label.split())
    if fits(label):
        return label
    return next(
        (text for end in range(len(label), 0, -1) if fits(text := f"{label[:end].rstrip()}...")), ""
    )


_FILE_TYPE = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}")


def names_a_folder(out: Path) -> bool:
    """Whether a path has no ending like that of a file: folders may be named SiT-cfg-1.5-ODE-50."""
    return not _FILE_TYPE.fullmatch(out.suffix)


def check_out(out: Path) -> None:
    """ValueError unless `write_images` can write this kind of file."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(
            f"out must end in .png or .npz, got {str(out)!r}; a folder's name has no such ending"
        )


def write_images(
    out: Path,
    images: Tensor,
    labels: Sequence[int] | Sequence[str],
    class_names: Sequence[str] | None = None,
    before: Tensor | None = None,
) -> None:
    """Write images (N, height, width, 3) uint8 as a labelled grid (.png) or as arrays (.npz).

    labels: class numbers or prompts. class_names: what the numbers are called, if it is known.
    before: images of the same shape to show above them. A single image of a prompt is written as
    it is, without a label.
    """
    with atomic_write(out) as file:
        if out.suffix == ".npz":
            arrays = {"arr_0": images.cpu().numpy(), "labels": np.array(labels)}
            if class_names is not None:
                arrays[CLASS_NAMES] = np.array(class_names)
            np.savez(file, **arrays)  # type: ignore[arg-type]
        elif len(images) == 1 and before is None and isinstance(labels[0], str):
            Image.fromarray(images[0].cpu().numpy()).save(file, format="PNG")
        else:
            names = [
                class_names[label] if class_names and isinstance(label, int) else str(label)
                for label in labels
            ]
            if before is None:
                picture = labelled_grid(images, names)
            else:
                picture = labelled_grid(
                    torch.cat([before.cpu(), images.cpu()]),
                    [*[""] * len(before), *names],
                    columns=len(names),
                )
            picture.save(file, format="PNG")


def summary_line(out: Path, count: int, plan: Plan | StagedPlan) -> str:
    """What was written, by which plan, with how many calls per image."""
    cost = plan.cost
    price = f", priced as {plan.price:.3g} at full size" if isinstance(plan, StagedPlan) else ""
    return (
        f"{out}: {count} images by {plan} ({cost.predictor} predictor and {cost.refiner} "
        f"refiner calls{price})"
    )
