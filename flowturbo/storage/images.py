"""Images as arrays: folders with a sub-folder a class, read as centre-cropped squares of uint8."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .files import CheckpointError, open_npz

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# The content decides how a file is read, whatever its name says, but never by pillow's other
# readers (one calls ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_THREADS = min(8, os.cpu_count() or 1)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageFiles:
    """Image i is root / names[i], of class classes[labels[i]]. names are "class/file"; labels (N,)
    int64.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """(N, size, size, 3) uint8."""
        return _read_all([self.root / self.names[i] for i in indices], size)


def scan(folder: str | os.PathLike[str]) -> ImageFiles:
    """The images of a folder with a sub-folder a class: classes and files in the order of their
    names, hidden ones left out.

    Only images directly in a class's folder count (png, jpg, jpeg, webp, bmp). ValueError for a
    folder without classes, or a class without images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"images must be a folder with a sub-folder for each class, but {root} {_what(root)}"
        )
    with os.scandir(root) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise ValueError(
            f"images must be a folder with a sub-folder for each class, but {root} has no "
            "sub-folders"
        )
    names: list[str] = []
    counts = []
    for name in classes:
        with os.scandir(root / name) as entries:
            files = sorted(e.name for e in entries if _is_image(e))
        if not files:
            raise ValueError(
                f"every class needs an image ({', '.join(EXTENSIONS)}), but {root / name} has none"
            )
        names += [f"{name}/{file}" for file in files]
        counts.append(len(files))
    return ImageFiles(root, names, np.repeat(np.arange(len(classes)), counts), classes)


@dataclass(frozen=True)
class CaptionedImages:
    """Image i is root / names[i], and captions[i] says what it shows."""

    root: Path
    names: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """(N, size, size, 3) uint8."""
        return _read_all([self.root / self.names[i] for i in indices], size)


def scan_captions(folder: str | os.PathLike[str]) -> CaptionedImages:
    """The images of a folder with captions: a line each of metadata.jsonl ("file_name", "text"), or
    a .txt beside each image.

    ValueError naming the file where there are none, or an image has no caption.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"images must be a folder of images with captions, but {root} {_what(root)}"
        )
    table = root / "metadata.jsonl"
    if table.is_file():
        pairs = [
            _caption_of(table, number, line)
            for number, line in enumerate(table.read_text().splitlines(), 1)
            if line.strip()
        ]
    else:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if _is_image(entry))
        pairs = [(name, _text_beside(root / name)) for name in names]
    if not pairs:
        raise ValueError(
            f"images must be a folder of images ({', '.join(EXTENSIONS)}) with captions, but "
            f"{root} has none"
        )
    return CaptionedImages(root, [name for name, _ in pairs], [text for _, text in pairs])


def _caption_of(table: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        name, text = row["file_name"], row["text"]
        known = isinstance(name, str) and isinstance(text, str)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{table}, line {number}, must be JSON with file_name and text, got {line[:80]!r}"
        )
    if not (table.parent / name).is_file():
        raise ValueError(f"{table}, line {number}: {name} does not exist")
    return name, text


def _text_beside(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.is_file():
        raise ValueError(
            f"{image} has no caption: {path.name} beside it, or a line of metadata.jsonl"
        )
    return path.read_text().strip()


def _what(path: Path) -> str:
    return "is a file" if path.exists() else "does not exist"


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Links that lead nowhere count: better an error that names the file than an image fewer."""
    return (
        not entry.name.startswith(".")
        and entry.name.lower().endswith(EXTENSIONS)
        and not entry.is_dir()
    )


def _read_all(paths: Sequence[Path], size: int) -> np.ndarray:
    # Pillow decodes and resizes without the interpreter's lock.
    with ThreadPoolExecutor(_THREADS) as pool:
        return np.stack(list(pool.map(lambda path: read_image(path, size), paths)))


def read_whole(paths: Sequence[Path]) -> list[np.ndarray]:
    """Files -> (height, width, 3) uint8 each, of their own sizes: as `read_image`, but not
    cropped.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_whole, paths))


def _whole(path: Path) -> np.ndarray:
    with _opened(path) as image:
        return np.asarray(_rgb(_upright(image)))


def read_image(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """A file -> (size, size, 3) uint8: upright by its EXIF orientation, on white where it is
    transparent, cropped by `square`.

    Raises CheckpointError naming the file if it is missing, damaged or no image.
    """
    with _opened(path) as image:
        try:
            return fitted(image, size)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} is no whole image: {error or type(error).__name__}"
            ) from error


def fitted(image: Image.Image, size: int) -> np.ndarray:
    """An image of any kind and size -> (size, size, 3) uint8, as `read_image` makes it."""
    return square(_rgb(_upright(image)), size)


def read_mask(path: str | os.PathLike[str], size: int, of: str | os.PathLike[str]) -> np.ndarray:
    """A file -> (size, size) bool, where it is bright, cropped as `read_image` crops the image `of`
    which it is the mask.

    A mask with transparency is read by it alone: where it is transparent. ValueError unless it has
    the image's size.
    """
    with _opened(path) as mask, _opened(of) as image:
        mask, image = _upright(mask), _upright(image)
        if mask.size != image.size:
            raise ValueError(
                f"mask {path} must have the size of {of}, {image.size}, got {mask.size}"
            )
        clear = transparency(mask)
        grey = Image.fromarray(clear) if clear is not None else mask.convert("L")
        return square(grey.convert("RGB"), size)[..., 0] > 127


def box_mask(box: Sequence[float], height: int, width: int) -> np.ndarray:
    """(left, top, right, bottom), shares of width and height -> (height, width) bool: pixels whose
    centre is inside.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            "box must be left, top, right, bottom with 0 <= left < right <= 1 and 0 <= top < "
            f"bottom <= 1, got {box}"
        )
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return ((y >= top) & (y <= bottom))[:, None] & ((x >= left) & (x <= right))[None]


def read_npz(path: str | os.PathLike[str]) -> np.ndarray:
    """An .npz -> its arr_0, (N, height, width, 3) uint8. CheckpointError naming the file if it
    can't be read or holds others.
    """
    with open_npz(path) as arrays:
        if "arr_0" not in arrays:
            raise CheckpointError(f"{path} is no .npz with arr_0")
        images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise CheckpointError(
            f"{path} must hold arr_0 (N, height, width, 3) uint8, got {images.shape} {images.dtype}"
        )
    return images


def read_transparency(path: str | os.PathLike[str], size: int) -> np.ndarray | None:
    """A file -> (size, size) bool, where it is transparent, cropped as `read_image` does, or None
    if it is nowhere.
    """
    with _opened(path) as image:
        clear = transparency(_upright(image))
        return (
            None
            if clear is None
            else square(Image.fromarray(clear).convert("RGB"), size)[..., 0] > 127
        )


def transparency(image: Image.Image) -> np.ndarray | None:
    """(height, width) uint8, 255 where the image is transparent, or None where it is opaque all
    over.
    """
    if "transparency" not in image.info and not image.mode.lower().endswith("a"):
        return None
    clear = 255 - np.asarray(image.convert("RGBA"))[..., 3]
    return clear if clear.max() > 127 else None


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image in memory. CheckpointError naming the file if it is missing, damaged or no image."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # pillow raises half a dozen kinds for damaged files
        raise CheckpointError(
            f"{path} is no whole image: {error or type(error).__name__}"
        ) from error
    yield image


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centre of an RGB image, (size, size, 3) uint8, as ADM crops, by which ImageNet models are
    trained and scored.

    Halved by a box filter while its shorter side is at least twice the size, then resized (bicubic)
    so that this side fits.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a photo with damaged EXIF data is still a whole photo
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: pillow's own conversion would cut all values above 255 off. Colour of 16 bits
        # it narrows itself, just so.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode.lower().endswith("a"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
