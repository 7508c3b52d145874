"""Training data: images as a person sees them, the same batch however it is split, and files that
are whole or refused.
"""

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowturbo.data.latents import ImageFolder, Latents, digits, load_data, needs_vae, order
from flowturbo.models.vae import Pixels
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import CheckpointError, save_tensors
from flowturbo.storage.images import read_image, scan, square


class Halved:
    """A VAE by exact sums: three channels of half the side, weighted so that left and right differ,
    and a standard deviation.
    """

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.permute(0, 3, 1, 2).float()
        mean = (x[..., ::2, ::2] * self.weight[0] + x[..., 1::2, 1::2] * self.weight[1]) / 512
        return mean, mean / 8

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """An image of waves, which resizing does not blur away."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(rng.uniform(0.05, 0.6) * y + rng.uniform(0.05, 0.6) * x + rng.uniform(0, 6))
        for _ in range(3)
    ]
    return np.round(127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 4, 1 and 3 images of several sizes and formats."""
    names = [
        "a/1.png",
        "a/2.JPEG",
        "a/3.webp",
        "a/4.bmp",
        "b/x.png",
        "c/10.png",
        "c/2.png",
        "c/9.jpg",
    ]
    for i, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(i, 16 + 3 * i, 50 - 4 * i)).save(path)
    return tmp_path / "images"


# ------------------------------------------------------------------------ images


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


def test_classes_are_the_sub_folders_in_order(folder: Path) -> None:
    for extra in (
        "a/.hidden.png",
        ".trash/a.png",
        "a/notes.txt",
        "readme.md",
        "a/deeper.png/x.png",
    ):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not an image")
    files = scan(folder)
    assert files.classes == ["a", "b", "c"]
    assert files.names == [
        "a/1.png",
        "a/2.JPEG",
        "a/3.webp",
        "a/4.bmp",
        "b/x.png",
        "c/10.png",
        "c/2.png",
        "c/9.jpg",
    ]
    assert files.labels.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    read = files.read([5, 0], 8)
    assert np.array_equal(
        read, np.stack([read_image(folder / "c/10.png", 8), read_image(folder / "a/1.png", 8)])
    )


def test_folders_without_images_or_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    Image.fromarray(pixels(0, 9, 9)).save(tmp_path / "flat" / "a.png")
    (folder / "bare").mkdir()
    for path, words in (
        (tmp_path / "none", "none does not exist"),
        (folder / "a" / "1.png", r"1\.png is a file"),
        (tmp_path / "empty", "empty has no sub-folders"),
        (tmp_path / "flat", "flat has no sub-folders"),
        (folder, "bare has none"),
    ):
        with pytest.raises(ValueError, match=words):
            scan(path)


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
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
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


# ------------------------------------------------------------------------ batches


def random_latents(
    seed: int, count: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.randn(count, 2, 4, 4, generator=g).to(dtype)
        for name in ("latents", "latents_flipped")
    }
    parts |= {
        name: torch.rand(count, 2, 4, 4, generator=g).to(dtype) for name in ("std", "std_flipped")
    }
    return {**parts, "labels": torch.randint(5, (count,), generator=g)}


def made(parts: dict[str, Tensor]) -> Latents:
    others = {name: values for name, values in parts.items() if name not in ("latents", "labels")}
    return Latents(parts["latents"], parts["labels"], **others)  # type: ignore[arg-type]


def test_a_batch_made_in_parts_is_the_whole_batch(folder: Path) -> None:
    parts = random_latents(0)
    plain = {name: parts[name] for name in ("latents", "labels")}
    for data in (
        made(parts),
        made(plain),
        ImageFolder(folder, Halved(), 8),
        ImageFolder(folder, Pixels(), 8),
        digits(),
    ):
        indices = np.array([3, 0, 7, 3, 5, 1])
        whole, labels = data.batch(indices, StepRandom(4, 9, range(6)))
        torch.manual_seed(1)  # nothing may come from the global generator
        for rows in (range(0, 2), range(2, 3), range(3, 6)):
            part, part_labels = data.batch(indices[rows.start : rows.stop], StepRandom(4, 9, rows))
            assert torch.equal(part, whole[rows.start : rows.stop])
            assert torch.equal(part_labels, labels[rows.start : rows.stop])
        assert (whole.shape, whole.dtype, labels.dtype) == (
            (6, *data.shape),
            torch.float32,
            torch.int64,
        )
        assert not whole.requires_grad


def test_every_other_use_is_mirrored_and_rows_and_steps_draw_their_own(folder: Path) -> None:
    data = ImageFolder(folder, Pixels(), 8)
    straight = Pixels().encode(torch.from_numpy(data.files.read([2], 8)))[0][0]
    mirrored = 0
    for step in range(10):
        rows, _ = data.batch(np.full(40, 2), StepRandom(5, step, range(40)))
        flipped = (rows == straight.flip(2)).flatten(1).all(dim=1)
        assert ((rows == straight).flatten(1).all(dim=1) ^ flipped).all()
        mirrored += int(flipped.sum())
    assert 160 < mirrored < 240  # of 400: four standard deviations


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_are_mean_plus_std_times_noise_of_either_side(dtype: torch.dtype) -> None:
    parts = random_latents(1, dtype=dtype)
    data = made(parts)
    assert data.mean.dtype == dtype  # held as it came
    indices = np.arange(9).repeat(20)
    got, labels = data.batch(indices, StepRandom(6, 2, range(180)))
    draws = StepRandom(6, 2, range(180))
    flip, noise = draws.uniform() < 0.5, draws.normal((2, 4, 4))
    for i, row in enumerate(indices):
        side = "_flipped" if flip[i] else ""
        truth = (
            parts["latents" + side][row].double()
            + parts["std" + side][row].double() * noise[i].double()
        )
        assert (got[i] - truth).abs().max() < 1e-6
    assert torch.equal(labels, parts["labels"][indices])
    assert 50 < int(flip.sum()) < 130


def test_exact_latents_draw_nothing() -> None:
    parts = random_latents(2)
    data = Latents(parts["latents"], parts["labels"])
    draws, fresh = StepRandom(0, 0, range(3)), StepRandom(0, 0, range(3))
    got, _ = data.batch(np.array([8, 0, 4]), draws)
    assert torch.equal(got, parts["latents"][[8, 0, 4]])
    assert torch.equal(draws.uniform(), fresh.uniform())


def test_latents_stay_where_the_vae_is(folder: Path) -> None:
    class Elsewhere(Halved):
        def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            mean, std = super().encode(images)
            return mean.to("meta"), None if std is None else std.to("meta")

    latents, labels = ImageFolder(folder, Elsewhere(), 8).batch(
        np.array([1, 2]), StepRandom(0, 0, range(2))
    )
    assert (latents.device.type, latents.shape, labels.device.type) == ("meta", (2, 3, 4, 4), "cpu")


def test_the_digits_are_split_four_to_one_and_in_range() -> None:
    train, test = digits("train"), digits("test")
    assert (len(train), len(test), train.num_classes, train.shape) == (1438, 359, 10, (1, 8, 8))
    assert (float(train.mean.min()), float(train.mean.max())) == (-1, 1)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert np.array_equal((test.mean.view(-1, 64).numpy() + 1) * 8, images[4::5])
    assert test.labels.tolist() == labels[4::5].tolist()
    others = np.arange(len(images)) % 5 != 4
    assert np.array_equal((train.mean.view(-1, 64).numpy() + 1) * 8, images[others])
    assert train.labels.tolist() == labels[others].tolist()
    with pytest.raises(ValueError, match="part must be"):
        digits("other")


def test_the_order_is_a_function_of_the_place_and_every_epoch_a_permutation() -> None:
    whole = order(10, seed=3, first=0, count=35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert len({tuple(whole[10 * e : 10 * e + 10]) for e in range(3)}) == 3
    for first, count in ((0, 7), (7, 9), (16, 19), (9, 2)):
        assert np.array_equal(order(10, 3, first, count), whole[first : first + count])
    assert not np.array_equal(order(10, 4, 0, 10), whole[:10])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latents": torch.zeros(9, 4, 4)}, r"\(N, C, H, W\)"),
        ({"latents": torch.zeros(0, 2, 4, 4)}, "N at least 1"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "9 whole numbers"),
        ({"labels": torch.zeros(9)}, "whole numbers"),
        ({"labels": -torch.ones(9, dtype=torch.int64)}, "from 0 on"),
        ({"std": torch.zeros(9, 2, 4, 5)}, "std must have the latents' shape"),
        (
            {"latents_flipped": torch.zeros(8, 2, 4, 4)},
            "latents_flipped must have the latents' shape",
        ),
        ({"std_flipped": None}, "std_flipped must come with"),
        ({"std": None}, "std_flipped must come with"),
        ({"latents_flipped": None}, "std_flipped must come with"),
        ({"latents": torch.full((9, 2, 4, 4), torch.nan)}, "latents must be finite"),
        ({"std_flipped": torch.full((9, 2, 4, 4), torch.inf)}, "std_flipped must be finite"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    change: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    parts = {
        name: values for name, values in (random_latents(3) | change).items() if values is not None
    }
    with pytest.raises(ValueError, match=words):
        made(parts)
    np.savez(tmp_path / "a.npz", **{name: values.numpy() for name, values in parts.items()})
    with pytest.raises(CheckpointError, match=rf"a\.npz.*{words}"):
        load_data(tmp_path / "a.npz")


# ------------------------------------------------------------------------ sources


def same(a: Latents, b: Latents) -> bool:
    draws = [StepRandom(0, 0, range(40)) for _ in (a, b)]
    indices = np.arange(40) % len(a)
    (x, y), (u, v) = a.batch(indices, draws[0]), b.batch(indices, draws[1])
    return torch.equal(x, u) and torch.equal(y, v) and a.num_classes == b.num_classes


@pytest.mark.parametrize(
    "names", [("latents", "labels"), ("latents", "labels", "std"), tuple(random_latents(0))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_latents_from_npz_shards_and_memory(
    tmp_path: Path, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    parts = {
        name: values for name, values in random_latents(4, dtype=dtype).items() if name in names
    }
    np.savez(
        tmp_path / "a.npz",
        other=np.zeros(3),
        **{name: values.numpy() for name, values in parts.items()},
    )
    for k, rows in enumerate((slice(0, 4), slice(4, 5), slice(5, 9))):
        shard = {name: values[rows] for name, values in parts.items()} | {
            "other": torch.zeros(k + 1)
        }
        save_tensors(tmp_path / "shards" / f"{k}.safetensors", shard, {})
    (tmp_path / "shards" / "._0.safetensors").write_bytes(b"what a Mac leaves beside files")
    expected = made(parts)
    for source in (tmp_path / "a.npz", str(tmp_path / "a.npz"), tmp_path / "shards"):
        got = load_data(source)
        assert isinstance(got, Latents)
        assert same(got, expected)
        assert got.mean.dtype == dtype
        assert not needs_vae(source)


def test_a_folder_of_images_needs_a_vae_and_a_size(folder: Path, tmp_path: Path) -> None:
    assert needs_vae(folder)
    assert needs_vae(str(folder))
    assert not needs_vae("digits")
    for given in ({}, {"vae": Pixels()}, {"image_size": 8}):
        with pytest.raises(ValueError, match="needs a vae and an image_size"):
            load_data(folder, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        load_data(folder, vae=Pixels(), image_size=0)
    data = load_data(folder, vae=Halved(), image_size=8)
    assert (len(data), data.num_classes, data.shape) == (8, 3, (3, 4, 4))
    assert data.batch(np.array([7, 0]), StepRandom(0, 0, range(2)))[1].tolist() == [2, 0]
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare has neither"):
        load_data(tmp_path / "bare")
    for name in ("nothing", "file.txt"):
        with pytest.raises(ValueError, match="data must be 'digits'"):
            load_data(tmp_path / name)


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_npz_files_are_never_unpickled_and_damage_is_named(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    objects = np.empty(1, dtype=object)
    objects[0] = Canary(canary)
    np.savez(tmp_path / "objects.npz", latents=objects, labels=np.zeros(1, dtype=np.int64))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Canary(canary)))
    good = {name: values.numpy() for name, values in random_latents(5).items()}
    np.savez(tmp_path / "good.npz", **good)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(content[:-300])
    (tmp_path / "flipped.npz").write_bytes(
        content[:500] + bytes([content[500] ^ 1]) + content[501:]
    )
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "text.npz", latents=np.array(["a"]), labels=np.zeros(1, dtype=np.int64))
    for name in ("objects", "pickle", "truncated", "flipped", "images", "text", "none"):
        with pytest.raises(CheckpointError, match=rf"{name}\.npz"):
            load_data(tmp_path / f"{name}.npz")
    assert not canary.exists()
    with pytest.raises(CheckpointError, match="got arr_0"):
        load_data(tmp_path / "images.npz")


def shard(
    path: Path,
    drop: tuple[str, ...] = (),
    change: dict[str, Tensor] | None = None,
    **description: object,
) -> None:
    parts = {name: values for name, values in random_latents(6, 3).items() if name not in drop}
    save_tensors(path, {**parts, **(change or {})}, description)


def test_shards_that_do_not_belong_together_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"vae": "a"}
    first = {"kind": "latents", "settings": settings, "shards": 2, "shard": 0, "num_classes": 9}
    wide = {
        name: torch.zeros(3, 2, 6, 6)
        for name in ("latents", "std", "latents_flipped", "std_flipped")
    }
    for n, (arguments, words) in enumerate(
        (
            (
                dict(drop=("std", "std_flipped")),
                "b.safetensors holds labels, latents, latents_flipped with",
            ),
            (dict(drop=("latents_flipped", "std_flipped")), "b.safetensors holds"),
            (dict(drop=("labels",)), "b.safetensors must hold 'latents' and 'labels'"),
            (dict(drop=("latents",)), "b.safetensors must hold 'latents' and 'labels'"),
            (
                dict(change=wide),
                r"b.safetensors holds .* \(2, 6, 6\), but a.safetensors holds .* \(2, 4, 4\)",
            ),
            (
                dict(change={"labels": torch.zeros(2, dtype=torch.int64)}),
                "b.safetensors: labels must be 3 whole",
            ),
            (
                dict(change={"labels": torch.full((3,), 9)}),
                "b.safetensors: labels must be below 9, got 9",
            ),
            (
                dict(settings={"vae": "b"}),
                "b.safetensors and a.safetensors are not of one set: they differ in settings",
            ),
            (dict(kind="weights"), "not of one set: they differ in kind"),
            (dict(num_classes=8), "not of one set: they differ in num_classes"),
            (dict(shards=3), "not of one set: they differ in shards"),
            (dict(shard=0), "shards 1 of 2 are missing"),
        )
    ):
        place = tmp_path / str(n)
        shard(place / "a.safetensors", **first)  # type: ignore[arg-type]
        shard(place / "b.safetensors", **(first | {"shard": 1} | arguments))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=words):
            load_data(place)
    whole = tmp_path / "whole"
    shard(whole / "a.safetensors", **first)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="shards 1 of 2 are missing"):
        load_data(whole)
    shard(whole / "b.safetensors", **(first | {"shard": 1}))  # type: ignore[arg-type]
    assert load_data(whole).num_classes == 9
    shard(whole / "c.safetensors", **(first | {"shard": 1}))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="twice"):
        load_data(whole)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.safetensors")
    path = tmp_path / "b.safetensors"
    content = path.read_bytes()
    load_data(tmp_path)
    for damaged in (
        content[:-1],
        content[:-40] + bytes([content[-40] ^ 4]) + content[-39:],
        b"",
        content[:100],
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"b\.safetensors"):
            load_data(tmp_path)
