"""`flowturbo emoji`: a data set of small colour pictures with 42 classes, made from two packages.

The pictures are Noto Emoji and Fluent Emoji, which may be used and changed freely. They are not in
this repository: the recipe makes the same arrays of them everywhere, down to the digest.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow

from ..checks import positive
from ..storage.files import (
    CheckpointError,
    atomic_write,
    load_arrays,
    save_arrays,
    write_text,
)
from ..storage.resume import OTHER_FOLDER, check_same, remove_partial_files
from .emoji_classes import (
    CLASS_NAMES,
    FLUENT_FOLDER,
    KINDS,
    NOTO_FOLDER,
    STYLES,
    Picture,
    held_out,
    pictures,
)
from .emoji_sheet import NOTICE, sheet
from .npm_packages import Package, fetched, given, read


@dataclass(frozen=True)
class Emoji:
    """Make the emoji data set: some 3,300 small colour pictures of 42 classes.

    They come in two npm packages, 90 MB, which npm fetches. Writes train.npz and held-out.npz, for
    `flowturbo train --data`, a sheet of the pictures and their licences.
    """

    out: Path
    """Folder for the data. The packages are kept in its folder "packages"."""
    packages: Path | None = None
    """A folder that holds the packages' files already, as `npm pack` writes them."""
    size: int = 32
    """Height and width of the pictures."""
    check: bool = True
    """Refuse pictures that differ from those that the recipe is known to make."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.packages is not None:
            object.__setattr__(self, "packages", Path(self.packages))
        if positive("size", self.size) > _LARGEST:
            raise ValueError(
                f"size must be at most {_LARGEST}, the size of the larger originals, got "
                f"{self.size}"
            )


_LARGEST = 256
FORMAT = 1
PARTS = ("train", "held-out")


@dataclass(frozen=True)
class Recipe:
    """The packages of Noto's and Fluent's pictures, and what the pictures become.

    digests: size -> the SHA-256 of each part's pixels and labels, as `digest_of` computes it.
    """

    noto: Package
    fluent: Package
    digests: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


RECIPE = Recipe(
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    {
        32: {
            "train": "3fe3bcba3477760402ae293f92fa01df6ae40052113a5128c392ce655c9a60ff",
            "held-out": "44306651996b40d0d35751052a49a559d4498c8ae11db222dad12ed8edf816e1",
        }
    },
)


def emoji(settings: Emoji) -> str:
    """Write the data set; returns a table of its classes, and its digests.

    train.npz and held-out.npz hold

    - latents (N, 3, size, size) float16: pixels on white, from -1 to 1;
    - latents_flipped, of the mirrored pictures;
    - labels (N,) int64: twice the number of the kind, plus 0 for Noto and 1 for Fluent;
    - class_names (42,), the name of each label.

    Each file is written whole or not at all, equal data gives equal bytes, and packages that are
    there are not fetched again, so an interrupted run is resumed by the same command. Raises
    ValueError for a folder that holds something else, for packages that are missing, and for
    pictures that differ from the recorded ones; CheckpointError for damaged or other packages.
    """
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"out must be a folder, but {settings.out} is a file")
    recipe = RECIPE
    described = _descriptions(settings, recipe)
    for part, description in described.items():
        _check_unused(settings.out / f"{part}.npz", description)
    found, pixels = _pictures(settings, recipe)
    families = held_out(found)
    rows = {
        "train": [i for i, picture in enumerate(found) if picture.family not in families],
        "held-out": [i for i, picture in enumerate(found) if picture.family in families],
    }
    labels = np.array([picture.label for picture in found], dtype=np.int64)
    digests = {part: digest_of(pixels[rows[part]], labels[rows[part]]) for part in PARTS}
    verdict = _verdict(digests, recipe.digests.get(settings.size), settings.check)
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_partial_files(settings.out, *(f"{part}.npz" for part in PARTS), _SHEET, _NOTICE)
    for part in PARTS:
        path = settings.out / f"{part}.npz"
        arrays = _arrays(pixels[rows[part]], labels[rows[part]])
        save_arrays(path, arrays, {**described[part], "pixels": digests[part]})
    with atomic_write(settings.out / _SHEET) as file:
        sheet(pixels[rows["train"]], labels[rows["train"]]).save(file, format="PNG", optimize=True)
    write_text(settings.out / _NOTICE, NOTICE)
    counts = {part: Counter(labels[rows[part]].tolist()) for part in PARTS}
    return f"{_table(counts)}\n\n{verdict}"


_SHEET, _NOTICE = "sheet.png", "NOTICE.txt"


def _descriptions(settings: Emoji, recipe: Recipe) -> dict[str, dict[str, Any]]:
    shared = {
        "kind": "emoji",
        "format": FORMAT,
        "size": settings.size,
        "packages": [recipe.noto.spec, recipe.fluent.spec],
        "licences": ["Noto Emoji: Apache-2.0", "Fluent Emoji: MIT"],
    }
    return {part: {**shared, "part": part} for part in PARTS}


def _check_unused(path: Path, description: Mapping[str, Any]) -> None:
    """ValueError if the file exists and is not of an earlier run with the same settings."""
    if not path.exists():
        return
    try:
        _, before = load_arrays(path)
    except CheckpointError as error:
        raise ValueError(f"{error}: {OTHER_FOLDER}, or delete it") from None
    check_same(path, before, description, free=("pixels",))


def _pictures(settings: Emoji, recipe: Recipe) -> tuple[list[Picture], np.ndarray]:
    """The pictures, and their pixels (N, size, size, 3) uint8."""
    folder, bring = (
        (settings.out / "packages", fetched)
        if settings.packages is None
        else (settings.packages, given)
    )
    paths = [bring(package, folder) for package in (recipe.noto, recipe.fluent)]
    noto = read(paths[0], recipe.noto, _TABLE, NOTO_FOLDER)
    fluent = read(paths[1], recipe.fluent, FLUENT_FOLDER)
    try:
        found = pictures(json.loads(noto.pop(_TABLE)), noto.keys(), fluent.keys())
    except CheckpointError as error:
        raise CheckpointError(f"{paths[0]}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{paths[0]} holds no table of emoji in {_TABLE}: {error!r}"
        ) from None
    missing = set(range(len(CLASS_NAMES))) - {picture.label for picture in found}
    if missing:
        names = ", ".join(CLASS_NAMES[label] for label in sorted(missing)[:8])
        raise CheckpointError(f"the packages hold no picture of {names}")
    pixels = np.stack(
        [
            _pixels((noto, fluent)[p.style][p.member], f"{paths[p.style]}: {p.member}", settings)
            for p in found
        ]
    )
    return found, pixels


_TABLE = "package/emoji.json"


def _pixels(content: bytes, name: str, settings: Emoji) -> np.ndarray:
    """A PNG or WebP -> (size, size, 3) uint8: on white, made a square, resized (Lanczos)."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
            opaque = image.convert("RGBA")
    except Exception as error:  # pillow raises many types for damaged files
        raise CheckpointError(f"{name} is no whole picture: {error!r:.200}") from error
    side = max(opaque.size)
    square = Image.new("RGBA", (side, side), "white")
    left, top = (side - opaque.width) // 2, (side - opaque.height) // 2
    square.alpha_composite(opaque, (left, top))
    size = (settings.size, settings.size)
    return np.asarray(square.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def digest_of(pixels: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of pixels (N, size, size, 3) uint8, as (N, 3, size, size), then of labels int64.

    Bytes are in order of the indices, numbers with their lowest byte first.
    """
    hashed = hashlib.sha256(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).tobytes())
    hashed.update(labels.astype("<i8").tobytes())
    return hashed.hexdigest()


def _verdict(digests: Mapping[str, str], recorded: Mapping[str, str] | None, check: bool) -> str:
    """What the digests are, and whether they are the recorded ones; ValueError if checked."""
    lines = [f"SHA-256 of {part}: {digest}" for part, digest in digests.items()]
    if recorded is None:
        return "\n".join([*lines, "No digest is recorded for pictures of this size."])
    if differing := [part for part in PARTS if digests[part] != recorded[part]]:
        message = (
            f"the pictures of {' and '.join(differing)} differ from the recorded ones (pillow "
            f"{pillow} may decode or resize them in another way than the pillow of the recipe)"
        )
        if check:
            raise ValueError(f"{message}; --no-check writes them nevertheless")
        return "\n".join([*lines, message])
    return "\n".join([*lines, "These are the recorded digests."])


def _arrays(pixels: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    latents = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1).astype(np.float16)
    return {
        "latents": np.ascontiguousarray(latents),
        "latents_flipped": np.ascontiguousarray(latents[..., ::-1]),
        "labels": labels,
        "class_names": np.array(CLASS_NAMES),
    }


def _table(counts: Mapping[str, Mapping[int, int]]) -> str:
    """The pictures of each kind: for training and held out, of Noto and of Fluent."""

    def row(name: str, labels: Sequence[int]) -> str:
        numbers = [counts[part].get(label, 0) for part in PARTS for label in labels]
        return f"| {name} | {' | '.join(map(str, numbers))} |"

    styles = len(STYLES)
    total = [sum(n for y, n in counts[p].items() if y % styles == s) for p in PARTS for s in (0, 1)]
    return "\n".join(
        [
            "| kind | Noto | Fluent 3D | Noto, held out | Fluent 3D, held out |",
            "|---|---|---|---|---|",
            *(row(kind, range(k * styles, (k + 1) * styles)) for k, kind in enumerate(KINDS)),
            f"| all | {' | '.join(map(str, total))} |",
        ]
    )
