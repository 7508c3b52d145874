"""Training data: the same batch however it is split, and latents of either side."""

from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import latents_of, random_latents
from PIL import Image
from smooth_images import pixels, smooth
from torch import Tensor

from flowturbo.data.latents import ImageFolder, Latents, digits, load_data, needs_vae, order
from flowturbo.models.vae import Pixels
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.images import read_image, scan


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
    with pytest.warns(
        UserWarning, match=r"2 files \(1 \.md, 1 \.txt\) left out, the first a/notes"
    ):
        files = scan(folder)
    assert files.classes == ["a", "b", "c"]
    assert files.names == [
        "a/1.png",
        "a/2.JPEG",
        "a/3.webp",
        "a/4.bmp",
        "a/deeper.png/x.png",
        "b/x.png",
        "c/10.png",
        "c/2.png",
        "c/9.jpg",
    ]
    assert files.labels.tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2]
    read = files.read([6, 0], 8)
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


def test_a_batch_made_in_parts_is_the_whole_batch(folder: Path) -> None:
    parts = random_latents(0)
    plain = {name: parts[name] for name in ("latents", "labels")}
    for data in (
        latents_of(parts),
        latents_of(plain),
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
    data = latents_of(parts)
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


def test_a_folder_of_images_needs_a_vae_and_a_size(folder: Path, tmp_path: Path) -> None:
    assert needs_vae(folder)
    assert needs_vae(str(folder))
    assert not needs_vae("digits")
    for options in ({}, {"vae": Pixels()}, {"image_size": 8}):
        with pytest.raises(ValueError, match="needs a vae and an image_size"):
            load_data(folder, **options)  # type: ignore[arg-type]
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
