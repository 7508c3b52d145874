"""Images as arrays of uint8, from files and from folders.

Training reads them as centre-cropped squares. A folder of classes has one sub-folder per class.
`folders` says which files count.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .captions import table_of_captions
from .files import CheckpointError, open_npz
from .folders import EXTENSIONS, files_below, images_among, sub_folders, suffix, warn_of_others
from .pixels import narrowed
from .text import file_path, read_lines

# pillow decides by a file's content, not by its name. Its other readers are not used: one of them
# calls ghostscript.
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
    """Images with class labels: image i is root / names[i], of class classes[labels[i]].

    names: "class/file". labels: (N,) int64.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Images of these numbers, (N, size, size, 3) uint8, as `read_image` reads them."""
        return _read_all([file_path(self.root, self.names[i]) for i in indices], size)


def scan(folder: str | os.PathLike[str]) -> ImageFiles:
    """The images of a folder with one sub-folder per class.

    Classes and files are in the order of their names. Images in deeper folders are of the class
    that these lie in; `folders` says which files are images. Raises ValueError for a folder without
    classes, for a class without images, and for images beside the classes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"images must be a folder with a sub-folder for each class, but {root} {_problem(root)}"
        )
    names = images_among(root, files_below(root))
    classes = sub_folders(root)
    if not classes:
        raise ValueError(
            f"images must be a folder with a sub-folder for each class, but {root} has no "
            "sub-folders"
        )
    if beside := [name for name in names if "/" not in name]:
        raise ValueError(
            f"every image must lie in the sub-folder of its class, but {root} has {len(beside)} "
            f"beside them, the first {beside[0]}"
        )
    counts = Counter(name.partition("/")[0] for name in names)
    if empty := [name for name in classes if not counts[name]]:
        raise ValueError(
            f"every class needs an image ({', '.join(EXTENSIONS)}), but {root / empty[0]} has none"
        )
    numbers = np.repeat(np.arange(len(classes)), [counts[name] for name in classes])
    return ImageFiles(root, names, numbers, classes)


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions: image i is root / names[i], with text captions[i]."""

    root: Path
    names: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Images of these numbers, (N, size, size, 3) uint8, as `read_image` reads them."""
        return _read_all([file_path(self.root, self.names[i]) for i in indices], size)


def scan_captions(folder: str | os.PathLike[str]) -> CaptionedImages:
    """The images of a folder with captions.

    Captions are the lines of metadata.jsonl ("file_name", "text"), or a .txt file beside each
    image; `folders` says which files are images. Raises ValueError, naming the file, if there are
    no images, if a caption is missing, and for a caption of an image that is missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"images must be a folder of images with captions, but {root} {_problem(root)}"
        )
    files = files_below(root)
    table = "metadata.jsonl"
    texts = {os.path.splitext(name)[0]: name for name in files if suffix(name) == ".txt"}
    images = images_among(root, files, used={table} if table in files else set(texts.values()))
    if table in files:
        pairs = table_of_captions(root / table, images)
    else:
        pairs = [(name, _text_beside(root, name, texts)) for name in images]
        stems = {os.path.splitext(name)[0] for name in images}
        warn_of_others(root, [text for stem, text in texts.items() if stem not in stems])
    if not pairs:
        raise ValueError(
            f"images must be a folder of images ({', '.join(EXTENSIONS)}) with captions, but "
            f"{root} has none"
        )
    return CaptionedImages(root, [name for name, _ in pairs], [text for _, text in pairs])


def _text_beside(root: Path, image: str, texts: Mapping[str, str]) -> str:
    """texts: the .txt files, by their names without the suffix."""
    stem = os.path.splitext(image)[0]
    if stem not in texts:
        raise ValueError(
            f"{root / image} has no caption: {Path(stem).name}.txt beside it, or a line of "
            "metadata.jsonl"
        )
    return "\n".join(read_lines(file_path(root, texts[stem]))).strip()


def _problem(path: Path) -> str:
    return "is a file" if path.exists() else "does not exist"


def _read_all(paths: Sequence[Path], size: int) -> np.ndarray:
    # pillow releases the GIL while it decodes and resizes.
    with ThreadPoolExecutor(_THREADS) as pool:
        return np.stack(list(pool.map(lambda path: read_image(path, size), paths)))


def read_whole(paths: Sequence[Path]) -> list[np.ndarray]:
    """Files -> arrays (height, width, 3) uint8 of their own sizes, not cropped."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_whole, paths))


def _whole(path: Path) -> np.ndarray:
    with _opened(path) as image:
        return np.asarray(_rgb(_upright(image)))


def read_image(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """A file -> (size, size, 3) uint8, centre-cropped by `square`.

    The EXIF orientation is applied, and transparent pixels are blended onto white. Raises
    CheckpointError, naming the file, if it is missing, damaged or no image.
    """
    with _opened(path) as image:
        try:
            return fitted(image, size)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} is no whole image: {error or type(error).__name__}"
            ) from error


def fitted(image: Image.Image, size: int) -> np.ndarray:
    """An image of any mode and size -> (size, size, 3) uint8, as `read_image` does."""
    return square(_rgb(_upright(image)), size)


def read_mask(path: str | os.PathLike[str], size: int, of: str | os.PathLike[str]) -> np.ndarray:
    """A mask's file -> (size, size) bool, cropped as `read_image` crops its image `of`.

    The mask is True where it is brighter than half of white, on the scale of `pixels`; or, if
    it has transparency, where it is transparent. Raises ValueError unless mask and image have one
    size.
    """
    with _opened(path, mask=True) as mask, _opened(of) as image:
        mask, image = _upright(mask), _upright(image)
        if mask.size != image.size:
            raise ValueError(
                f"mask {path} must have the size of {of}, {image.size}, got {mask.size}"
            )
        transparent = transparency(mask)
        grey = Image.fromarray(transparent) if transparent is not None else _brightness(mask)
        return square(grey.convert("RGB"), size)[..., 0] > 127


def box_mask(box: Sequence[float], height: int, width: int) -> np.ndarray:
    """A box -> (height, width) bool: the pixels whose centres are inside.

    box: (left, top, right, bottom), as shares of width and height.
    Raises ValueError for a box that is empty or not inside the image.
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
    """The array arr_0 of an .npz, (N, height, width, 3) uint8.

    Raises CheckpointError, naming the file, if it can't be read or has another content.
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
    """A file -> (size, size) bool, True where it is transparent; None if it is opaque.

    It is cropped as `read_image` does.
    """
    with _opened(path) as image:
        transparent = transparency(_upright(image))
    if transparent is None:
        return None
    return square(Image.fromarray(transparent).convert("RGB"), size)[..., 0] > 127


def transparency(image: Image.Image) -> np.ndarray | None:
    """(height, width) uint8, 255 where the image is transparent; None if it is opaque."""
    image = _eight_bits(image)
    if "transparency" not in image.info and not image.mode.lower().endswith("a"):
        return None
    transparent = 255 - np.asarray(image.convert("RGBA"))[..., 3]
    return transparent if transparent.max() > 127 else None


@contextmanager
def _opened(path: str | os.PathLike[str], mask: bool = False) -> Iterator[Image.Image]:
    """An image in memory. CheckpointError if it is missing, damaged, no image, or all but black.

    mask: it may hold 0 and 1.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # pillow raises many types for damaged files
        raise CheckpointError(
            f"{path} is no whole image: {error or type(error).__name__}"
        ) from error
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        try:
            narrowed("it", levels * 65535 if mask and levels.max() <= 1 else levels)
        except ValueError as error:
            raise CheckpointError(f"{path} can't be shown: {error}") from None
    yield image


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centre of an RGB image, (size, size, 3) uint8, cropped as ADM does.

    ImageNet models are trained and scored with this crop. The image is halved by a box filter while
    its shorter side is at least twice the size, then resized (bicubic) until that side fits.
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
    except Exception:  # damaged EXIF data, but the pixels may be fine
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey in 8. pillow narrows those of colour, but clips those of grey at 255."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    key = image.info.get("transparency")
    if key is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == key, 0, 255).astype(np.uint8)]))


def _brightness(image: Image.Image) -> Image.Image:
    """A mask as grey of 8 bits, of which white is 255; masks may also hold 0 and 1."""
    levels = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    if levels.max() <= 1:
        return Image.fromarray(levels.astype(np.uint8) * 255)
    return _eight_bits(image).convert("L")


def _rgb(image: Image.Image) -> Image.Image:
    image = _eight_bits(image)
    if "transparency" in image.info or image.mode.lower().endswith("a"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
