"""Encoding once is encoding at every step: the same batches, from folders and from .npz files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import CPU, Halved, batches, contents, settings
from safetensors import safe_open
from torch import Tensor

import flowturbo.data.encode as module
from flowturbo.data.encode import Encode, encode
from flowturbo.data.latents import ImageFolder, Latents, load_data
from flowturbo.models.vae import VAE, Pixels, load_vae
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import CheckpointError, load_tensors


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
    loads: list[tuple[str, torch.device, torch.dtype]] = []

    class Learning(Halved):
        def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            assert not torch.is_grad_enabled()
            return super().encode(images)

    def loading(name: str, device: torch.device, dtype: torch.dtype) -> VAE:
        loads.append((name, device, dtype))
        return Learning()

    monkeypatch.setattr(module, "load_vae", loading)
    encode(settings(folder, tmp_path / "out", vae="org/name"))
    assert loads == [("org/name", CPU, torch.float32)]
