"""Images of a folder as a person sees them, cropped at the centre, in classes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from smooth_images import pixels, smooth

from flowturbo.data.latents import ImageFolder
from flowturbo.models.vae import Pixels
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import CheckpointError
from flowturbo.storage.images import read_image, scan, square


def resized(values: np.ndarray, axis: int, count: int, box: bool) -> np.ndarray:
    """Antialiased resampling of one axis in float64, by its definition: a filter as wide as the
    shrinking asks.
    """
    length = values.shape[axis]
    wide = max(length / count, 1.0)
    centres = (np.arange(count) + 0.5) * length / count
    d = ((np.arange(length) + 0.5)[None] - centres[:, None]) / wide
    if box:
        weight = ((d > -0.5) & (d <= 0.5)).astype(float)
    else:  # Keys' cubic with a = -1/2
        d = np.abs(d)
        weight = np.where(
            d < 1,
            1.5 * d**3 - 2.5 * d**2 + 1,
            np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0),
        )
    weight /= weight.sum(axis=1, keepdims=True)
    return np.clip(np.moveaxis(np.tensordot(weight, values, axes=(1, axis)), 0, axis), 0, 255)


def cropped(values: np.ndarray, size: int) -> np.ndarray:
    """The definition of `square`, in float64."""
    values = values.astype(float)
    while min(values.shape[:2]) >= 2 * size:
        height, width = values.shape[:2]
        values = resized(resized(values, 1, width // 2, box=True), 0, height // 2, box=True)
    height, width = (round(n * size / min(values.shape[:2])) for n in values.shape[:2])
    values = resized(resized(values, 1, width, box=False), 0, height, box=False)
    top, left = (height - size) // 2, (width - size) // 2
    return values[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [8, 17])
@pytest.mark.parametrize(
    "height, width",
    [(17, 40), (39, 20), (64, 64), (34, 36), (80, 136), (143, 71), (9, 12), (68, 68)],
)
def test_the_centre_crop_is_its_definition(size: int, height: int, width: int) -> None:
    image = smooth(height * width, height, width)
    got = square(Image.fromarray(image), size)
    assert (got.shape, got.dtype) == ((size, size, 3), np.uint8)
    off = np.abs(got - cropped(image, size))
    # Pillow rounds to whole levels after each axis of each resizing: half a level up on average for
    # means of two.
    halvings = int(np.log2(min(height, width) / size))
    assert off.max() <= 1.5 + halvings
    assert off.mean() < 0.5 * (1 + halvings) + 0.1


@pytest.mark.parametrize("height, width", [(16, 16), (16, 31), (20, 16)])
def test_an_image_of_the_right_height_or_width_is_only_cut(height: int, width: int) -> None:
    image = pixels(0, height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    assert np.array_equal(
        square(Image.fromarray(image), 16), image[top : top + 16, left : left + 16]
    )


def test_images_are_read_as_a_person_sees_them(tmp_path: Path) -> None:
    colour, grey = pixels(1, 16, 16), pixels(2, 16, 16)[..., 0]
    alpha = np.random.default_rng(3).choice([0, 255], (16, 16)).astype(np.uint8)
    shown = np.where(alpha[..., None] == 255, colour, 255)
    shown_grey = np.where(alpha == 255, grey, 255)
    palette = Image.fromarray(colour).quantize(20)
    keyed = palette.copy()
    keyed.info["transparency"] = 3
    without = np.where(
        (np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB"))
    )
    one_key = Image.fromarray(colour)
    key = tuple(int(v) for v in colour[0, 0])
    matches = (colour == colour[0, 0]).all(axis=2, keepdims=True)
    three = lambda plane: np.repeat(plane[..., None], 3, axis=2)  # noqa: E731
    for what, image, expected in (
        ("colour", Image.fromarray(colour), colour),
        ("transparent", Image.fromarray(np.dstack([colour, alpha])), shown),
        ("grey", Image.fromarray(grey), three(grey)),
        ("grey transparent", Image.fromarray(np.dstack([grey, alpha])), three(shown_grey)),
        ("palette", palette, np.asarray(palette.convert("RGB"))),
        ("palette transparent", keyed, without),
        ("one bit", Image.fromarray(alpha).convert("1"), three(alpha)),
        ("sixteen bits", Image.fromarray(grey.astype(np.uint16) * 257), three(grey)),
    ):
        path = tmp_path / f"{what}.png"
        image.save(path, **({"transparency": 3} if what == "palette transparent" else {}))
        assert np.array_equal(read_image(path, 16), expected), what
    one_key.save(tmp_path / "key.png", transparency=key)
    assert np.array_equal(read_image(tmp_path / "key.png", 16), np.where(matches, 255, colour))
    photo = Image.fromarray(smooth(4, 16, 16))
    photo.save(
        tmp_path / "two.jpg",
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (16, 16))],
        quality=95,
    )
    photo.save(tmp_path / "one.jpg", quality=95)
    assert np.array_equal(
        read_image(tmp_path / "two.jpg", 16), read_image(tmp_path / "one.jpg", 16)
    )
    half = np.dstack([np.zeros_like(colour), np.full_like(grey, 128)])
    Image.fromarray(half).save(tmp_path / "half.webp", lossless=True, exact=True)
    assert abs(int(read_image(tmp_path / "half.webp", 16).mean()) - 127) <= 1
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    red.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "print.jpg", 16) - np.array([200.0, 30, 40])).max() <= 4


UPRIGHT = {
    # What EXIF says of the stored row 0 and column 0, as an operation that puts the image upright.
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
def test_photos_stand_upright(tmp_path: Path, orientation: int) -> None:
    stored = pixels(orientation, 16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    upright = UPRIGHT.get(orientation, UPRIGHT[1])(stored)
    assert np.array_equal(
        read_image(tmp_path / "a.png", 16),
        square(Image.fromarray(np.ascontiguousarray(upright)), 16),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_cost_the_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    photo = Image.fromarray(smooth(0, 16, 16))
    photo.save(path)
    whole = read_image(path, 16)
    for garbage in (
        b"garbage",
        b"II*\x00",
        b"II*\x00\xff\xff\xff\xff",
        b"II*\x00\x08\x00\x00\x00\xff\xff\x12\x01garbage",
    ):
        photo.save(path, exif=b"Exif\x00\x00" + garbage)
        assert np.array_equal(read_image(path, 16), whole)

    def failing(self: Image.Image) -> Image.Exif:
        raise SyntaxError("not a TIFF file")  # as some versions of pillow say

    monkeypatch.setattr(Image.Image, "getexif", failing)
    assert np.array_equal(read_image(path, 16), whole)


def test_files_that_are_no_whole_image_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(0, 64, 64)).save(buffer, "JPEG")
    png = io.BytesIO()
    Image.fromarray(pixels(0, 64, 64)).save(png, "PNG")
    tiff = io.BytesIO()  # a format that pillow reads, but not one of ours
    Image.fromarray(pixels(0, 64, 64)).save(tiff, "TIFF")
    enormous = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ):
        enormous += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    for name, content in (
        ("truncated.jpg", buffer.getvalue()[: len(buffer.getvalue()) // 2]),
        ("truncated.png", png.getvalue()[: len(png.getvalue()) // 2]),
        ("text.png", b"no image at all"),
        ("empty.png", b""),
        ("tiff.png", tiff.getvalue()),
        ("enormous.png", enormous),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for path in tmp_path.glob("*.*"):
        with pytest.raises(CheckpointError, match=path.name):
            read_image(path, 16)
        moved = path.rename(tmp_path / "images" / "a" / path.name)
        assert scan(tmp_path / "images").names == [f"a/{path.name}"]
        with pytest.raises(CheckpointError, match=path.name):
            ImageFolder(tmp_path / "images", Pixels(), 16).batch(
                np.array([0]), StepRandom(0, 0, [0])
            )
        moved.unlink()
