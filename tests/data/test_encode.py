"""Encoding once is encoding at every step: the same batches, whole shards after any interruption,
nothing mixed.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import flowturbo.data.encode as module
from flowturbo.data.encode import Encode, encode
from flowturbo.data.latents import ImageFolder, Latents, load_data
from flowturbo.models.vae import VAE, Pixels, load_vae
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import CheckpointError, load_tensors, save_tensors

CPU = torch.device("cpu")


class Halved:
    """A VAE by exact sums: three channels of half the side, weighted so that left and right differ,
    and a standard deviation.
    """

    scale, shift = 0.5, 0.25

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.permute(0, 3, 1, 2).float()
        mean = (x[..., ::2, ::2] + 2 * x[..., 1::2, 1::2]) / 510
        return mean, mean / 8

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Halved:
    """What any vae's name stands for in this test."""
    vae = Halved()
    monkeypatch.setattr(module, "load_vae", lambda name, device, dtype: vae)
    return vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images in three classes, of several sizes."""
    return make_images(tmp_path / "images", seed=0)


def make_images(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in (("cat", 5), ("dog", 2), ("zebra", 4)):
        (path / name).mkdir(parents=True)
        for i in range(count):
            values = rng.integers(256, size=(8 + 5 * i, 30 - 4 * i, 3), dtype=np.uint8)
            Image.fromarray(values).save(path / name / f"{i}.png")
    return path


def settings(source: Path, out: Path, **changes: object) -> Encode:
    given: dict[str, object] = dict(
        source=source,
        out=out,
        vae="any",
        image_size=8,
        batch_size=2,
        shard_size=4,
        dtype="float32",
        device="cpu",
    )
    return Encode(**(given | changes))  # type: ignore[arg-type]


def contents(out: Path) -> dict[str, tuple[dict[str, Tensor], object]]:
    return {path.name: load_tensors(path) for path in sorted(out.iterdir())}


def equal(a: Path, b: Path) -> bool:
    """The same files with the same names, tensors and descriptions."""
    left, right = contents(a), contents(b)
    return left.keys() == right.keys() and all(
        left[f][1] == right[f][1]
        and left[f][0].keys() == right[f][0].keys()
        and all(
            torch.equal(v, right[f][0][k]) and v.dtype == right[f][0][k].dtype
            for k, v in left[f][0].items()
        )
        for f in left
    )


def batches(data: object, count: int) -> Tensor:
    return data.batch(np.arange(4 * count) % count, StepRandom(7, 3, range(4 * count)))[0]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("halved")
def test_training_on_shards_is_training_on_the_images(folder: Path, tmp_path: Path) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    assert out == tmp_path / "out"
    stored, direct = load_data(out), ImageFolder(folder, Halved(), 8)
    assert (
        (len(stored), stored.shape, stored.num_classes)
        == (len(direct), direct.shape, direct.num_classes)
        == (11, (3, 4, 4), 3)
    )
    assert torch.equal(batches(stored, 11), batches(direct, 11))
    labels = stored.batch(np.arange(11), StepRandom(0, 0, range(11)))[1]
    assert labels.tolist() == [0] * 5 + [1] * 2 + [2] * 4


def test_exact_vaes_store_no_deviation_and_still_both_sides(folder: Path, tmp_path: Path) -> None:
    out = encode(settings(folder, tmp_path / "out", vae="pixels"))
    assert all(
        tensors.keys() == {"latents", "latents_flipped", "labels"}
        for tensors, _ in contents(out).values()
    )
    assert torch.equal(batches(load_data(out), 11), batches(ImageFolder(folder, Pixels(), 8), 11))


@pytest.mark.usefixtures("halved")
def test_half_precision_costs_its_rounding_and_no_more(folder: Path, tmp_path: Path) -> None:
    out = encode(settings(folder, tmp_path / "out", dtype="float16"))
    stored, direct = load_data(out), batches(ImageFolder(folder, Halved(), 8), 11)
    assert isinstance(stored, Latents)
    assert stored.std is not None
    assert stored.mean.dtype == stored.std.dtype == torch.float16
    # Mean and deviation are rounded to 2**-11 each, and |noise| < 6.
    bound = 2**-11 * stored.mean.abs().float().max() * (1 + 6 / 8)
    assert (batches(stored, 11) - direct).abs().max() < bound
    assert not torch.equal(batches(stored, 11), direct)


def test_a_real_autoencoder_from_a_folder(folder: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1, scaling_factor=0.4
    )
    network.save_pretrained(tmp_path / "vae")
    out = encode(settings(folder, tmp_path / "out", vae=str(tmp_path / "vae"), batch_size=3))
    direct = batches(ImageFolder(folder, load_vae(tmp_path / "vae", CPU, torch.float32), 8), 11)
    assert (batches(load_data(out), 11) - direct).norm() < 1e-5 * direct.norm()
    _, description = load_tensors(next(out.iterdir()))
    assert description is not None
    assert {k: description["settings"][k] for k in ("scale", "shift")} == {
        "scale": 0.4,
        "shift": 0.1,
    }


def test_mirrored_latents_are_those_of_mirrored_pixels(
    folder: Path, tmp_path: Path, halved: Halved
) -> None:
    data = ImageFolder(folder, halved, 8)
    mirrored = torch.from_numpy(data.files.read(range(11), 8)[:, :, ::-1].copy())
    mean, std = halved.encode(mirrored)
    assert std is not None
    shards = contents(encode(settings(folder, tmp_path / "both")))
    both = {
        name: torch.cat([tensors[name] for tensors, _ in shards.values()])
        for name in ("latents_flipped", "std_flipped", "latents")
    }
    assert torch.equal(both["latents_flipped"], mean)
    assert torch.equal(both["std_flipped"], std)
    assert not torch.equal(both["latents"].flip(3), mean)  # mirroring latents is not the same
    one = contents(encode(settings(folder, tmp_path / "one", flips=False)))
    assert all(tensors.keys() == {"latents", "std", "labels"} for tensors, _ in one.values())


@pytest.mark.usefixtures("halved")
def test_shards_are_named_and_described(folder: Path, tmp_path: Path) -> None:
    shards = contents(encode(settings(folder, tmp_path / "out")))
    assert list(shards) == [f"latents-0000{k}-of-00003.safetensors" for k in range(3)]
    assert [len(tensors["labels"]) for tensors, _ in shards.values()] == [4, 4, 3]
    for k, (_, description) in enumerate(shards.values()):
        assert isinstance(description, dict)
        assert description["settings"]["classes"] == ["cat", "dog", "zebra"]
        expected = {
            "vae": "any",
            "scale": 0.5,
            "shift": 0.25,
            "image_size": 8,
            "flips": True,
            "shard_size": 4,
            "dtype": "float32",
        }
        assert description["settings"].items() >= expected.items()
        assert (description["shard"], description["shards"], description["num_classes"]) == (
            k,
            3,
            3,
        )
    with safe_open(tmp_path / "out" / "latents-00000-of-00003.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"latents", "std", "latents_flipped", "std_flipped", "labels"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_killed_run_leaves_whole_shards_and_goes_on(
    folder: Path, tmp_path: Path, halved: Halved, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    uninterrupted = encode(settings(folder, tmp_path / "uninterrupted"))
    out, calls = tmp_path / "out", 0
    plain = Halved.encode

    def dying(self: Halved, images: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal calls
        calls += 1
        if calls == 4 * whole + 3:  # in the second batch of a shard
            raise Killed
        return plain(self, images)

    monkeypatch.setattr(Halved, "encode", dying)
    with pytest.raises(Killed):
        encode(settings(folder, out))
    monkeypatch.setattr(Halved, "encode", plain)
    left = {path.name: path.stat().st_ino for path in out.iterdir()}
    assert sorted(left) == [f"latents-0000{k}-of-00003.safetensors" for k in range(whole)]
    if whole:
        with pytest.raises(CheckpointError, match="missing"):
            load_data(out)
    # What a kill in the middle of a write leaves beside them.
    (out / ".latents-00002-of-00003.safetensors.x7.tmp").write_bytes(b"torn")
    encode(settings(folder, out))
    assert {
        path.name: path.stat().st_ino for path in out.iterdir() if path.name in left
    } == left  # kept, not made again
    assert equal(out, uninterrupted)


@pytest.mark.usefixtures("halved")
def test_the_same_images_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    runs = [encode(settings(folder, tmp_path / str(run))) for run in range(4)]
    for name in (path.name for path in runs[0].iterdir()):
        assert len({(run / name).read_bytes() for run in runs}) == 1


@pytest.mark.usefixtures("halved")
def test_damaged_shards_are_made_again_and_others_kept(folder: Path, tmp_path: Path) -> None:
    reference, out = (encode(settings(folder, tmp_path / name)) for name in ("reference", "out"))
    paths = sorted(out.iterdir())
    content = paths[1].read_bytes()
    before = [path.stat().st_ino for path in paths]
    for damaged in (content[:-1], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b""):
        paths[1].write_bytes(damaged)
        encode(settings(folder, out))
        assert equal(out, reference)
    assert [path.stat().st_ino for path in paths[::2]] == before[::2]


@pytest.mark.usefixtures("halved")
def test_batch_size_and_place_may_change_between_runs(folder: Path, tmp_path: Path) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    (out / "latents-00001-of-00003.safetensors").unlink()
    moved = folder.rename(tmp_path / "moved")
    encode(settings(moved, out, batch_size=3))
    after = {path.name: path.stat().st_ino for path in out.iterdir()}
    assert after.keys() == before.keys()
    assert sum(after[name] == before[name] for name in after) >= 2
    assert torch.equal(batches(load_data(out), 11), batches(ImageFolder(moved, Halved(), 8), 11))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(vae="other"), "vae was 'any' and is now 'other'"),
        (dict(image_size=10), "image_size was 8 and is now 10"),
        (dict(flips=False), "flips was True and is now False"),
        (dict(dtype="float16"), "dtype was 'float32' and is now 'float16'"),
        (dict(shard_size=5), "shard_size was 4 and is now 5"),
        (dict(shard_size=6), "none of the 2 shards of these settings"),
    ],
)
@pytest.mark.usefixtures("halved")
def test_shards_of_other_settings_are_not_touched(
    folder: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=words) as caught:
        encode(settings(folder, out, **change))
    assert "choose another folder" in str(caught.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_shards_of_another_scale_other_classes_other_images_or_no_shards_are_not_touched(
    folder: Path, tmp_path: Path, halved: Halved
) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    halved.scale = 1.5
    with pytest.raises(ValueError, match=r"scale was 0\.5 and is now 1\.5"):
        encode(settings(folder, out))
    halved.scale = 0.5
    (folder / "cat" / "0.png").rename(folder / "cat" / "00.png")
    with pytest.raises(
        ValueError, match=r"latents-00000-of-00003\.safetensors was made from other images"
    ):
        encode(settings(folder, out))
    (folder / "cat" / "00.png").rename(folder / "cat" / "0.png")
    encode(settings(folder, out))
    (folder / "dog").rename(folder / "hound")
    with pytest.raises(ValueError, match="classes was"):
        encode(settings(folder, out))
    (folder / "hound").rename(folder / "dog")
    save_tensors(
        out / "latents-00001-of-00003.safetensors", {"latents": torch.zeros(1)}, {"kind": "else"}
    )
    with pytest.raises(ValueError, match="was made by something else"):
        encode(settings(folder, out))
    other = tmp_path / "model"
    save_tensors(other / "model.safetensors", {"w": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"holds model\.safetensors, which is none of"):
        encode(settings(folder, other))


@pytest.mark.usefixtures("halved")
def test_a_bad_image_is_named_and_may_be_taken_out_without_losing_what_is_done(
    folder: Path, tmp_path: Path
) -> None:
    bad = folder / "dog" / "1.png"  # image 6, in the second shard
    bad.write_bytes(bad.read_bytes()[:60])
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"dog/1\.png"):
        encode(settings(folder, out))
    (first,) = out.iterdir()
    before = first.stat().st_ino
    bad.unlink()
    encode(settings(folder, out))
    assert first.stat().st_ino == before
    assert equal(out, encode(settings(folder, tmp_path / "reference")))
    assert len(load_data(out)) == 10


def test_latents_that_are_not_finite_are_refused_with_their_image(
    folder: Path, tmp_path: Path, halved: Halved
) -> None:
    plain = halved.encode
    for value, dtype in ((float("nan"), "float32"), (1e5, "float16")):

        def overflowing(images: Tensor, value: float = value) -> tuple[Tensor, Tensor | None]:
            mean, std = plain(images)
            mean[-1, 0, 0, 0] = value
            return mean, std

        halved.encode = overflowing  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=rf"NaN, or values beyond {dtype}, for cat/1\.png"):
            encode(settings(folder, tmp_path / dtype, dtype=dtype))
        assert not list((tmp_path / dtype).iterdir())


def archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("label_name", ["labels", "arr_1", None])
def test_images_of_an_npz(tmp_path: Path, halved: Halved, label_name: str | None) -> None:
    rng = np.random.default_rng(1)
    images, labels = (
        rng.integers(256, size=(7, 8, 8, 3), dtype=np.uint8),
        rng.integers(1, 5, size=7),
    )
    labels[3] = 5
    source = archive(
        tmp_path / "a.npz", arr_0=images, **({label_name: labels} if label_name else {})
    )
    out = encode(settings(source, tmp_path / "out", flips=False))
    data = load_data(out)
    assert isinstance(data, Latents)
    mean, std = halved.encode(torch.from_numpy(images))
    assert torch.equal(data.mean, mean)
    assert data.std is not None
    assert torch.equal(data.std, std if std is not None else mean)
    assert data.labels.tolist() == (labels.tolist() if label_name else [0] * 7)
    assert data.num_classes == (6 if label_name else 1)
    archive(source, arr_0=images ^ 1, **({label_name: labels} if label_name else {}))
    with pytest.raises(ValueError, match="from other images"):
        encode(settings(source, out, flips=False))


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.usefixtures("halved")
def test_an_npz_that_holds_no_images_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    canary = tmp_path / "canary"
    objects = np.empty(1, dtype=object)
    objects[0] = Canary(canary)
    for arrays, words in (
        (dict(arr_0=objects), "no whole .npz of plain arrays"),
        (dict(arr_0=images, labels=objects), "no whole .npz of plain arrays"),
        (dict(images=images), "got only images"),
        (dict(arr_0=images.astype(np.float32)), r"got \(3, 8, 8, 3\), float32"),
        (dict(arr_0=images[..., 0]), r"got \(3, 8, 8\), uint8"),
        (dict(arr_0=images[:0]), r"got \(0, 8, 8, 3\)"),
        (
            dict(arr_0=images, labels=np.zeros(2, dtype=np.int64)),
            "a label from 0 on for each of its 3 images in labels",
        ),
        (dict(arr_0=images, labels=np.zeros(3)), "a label from 0 on"),
        (dict(arr_0=images, arr_1=np.array([0, -1, 0])), "in arr_1"),
    ):
        source = archive(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=words) as caught:
            encode(settings(source, tmp_path / "out"))
        assert "a.npz" in str(caught.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        encode(settings(tmp_path / "none.npz", tmp_path / "out"))
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("halved")
def test_settings_that_can_not_work_are_refused(folder: Path, tmp_path: Path) -> None:
    for change, words in (
        (dict(image_size=0), "image_size must be at least 1"),
        (dict(batch_size=-1), "batch_size must be at least 1"),
        (dict(shard_size=0), "shard_size must be at least 1"),
        (dict(dtype="bfloat16"), "dtype must be one of float16, float32, got 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(folder, tmp_path / "out", **change)
    for out in (folder, folder / "latents", folder / "cat"):
        with pytest.raises(ValueError, match="out must lie outside"):
            encode(settings(folder, out))
    with pytest.raises(ValueError, match="does not exist"):
        encode(settings(tmp_path / "none", tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        encode(settings(folder, tmp_path / "file"))
    assert Encode(str(folder), str(tmp_path)) == replace(Encode(folder, tmp_path))  # type: ignore[arg-type]


def test_the_encoder_runs_in_float32_without_gradients(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.device, torch.dtype]] = []

    class Learning(Halved):
        def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            assert not torch.is_grad_enabled()
            return super().encode(images)

    def loading(name: str, device: torch.device, dtype: torch.dtype) -> VAE:
        asked.append((name, device, dtype))
        return Learning()

    monkeypatch.setattr(module, "load_vae", loading)
    encode(settings(folder, tmp_path / "out", vae="org/name"))
    assert asked == [("org/name", CPU, torch.float32)]
