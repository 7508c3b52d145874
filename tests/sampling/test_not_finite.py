"""Images that are not finite are named, and are never black pixels without a word."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_recorder import Fake
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vae_folders import make_folder

import flowturbo as ft
from flowturbo.checks import MOST_NAMED
from flowturbo.cli.main import main
from flowturbo.evaluation.image_sets import GeneratedImages, open_images
from flowturbo.evaluation.velocity import velocity_curve
from flowturbo.models.not_finite import finite_rows, not_finite_rows
from flowturbo.models.vae import DiffusersVAE, Pixels
from flowturbo.sampling.generate import MARK, generate
from flowturbo.storage.files import CheckpointError
from flowturbo.storage.image_shards import join, verify

BROKEN = 7
"""The class whose images are not finite."""


def digits(value: float = math.nan, label: int | None = BROKEN) -> ft.FlowModel:
    """The digits, with an embedding of one class that makes its images not finite."""
    model = ft.load("digits", device="cpu")
    if label is not None:
        with torch.no_grad():
            model.predictor.y_embedder.embedding_table.weight[label, 0] = value
    return model


@pytest.fixture(scope="module")
def broken() -> ft.FlowModel:
    return digits()


@pytest.fixture(scope="module")
def whole() -> ft.FlowModel:
    return digits(label=None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_images_are_named_by_number_label_and_seed_and_the_others_are_whole(whole, value):
    labels = [1, 7, 2, 7, 3]
    arguments = dict(plan="H1P1R1", labels=labels, guidance=1.5, seed=4, batch_size=2)
    expected = ft.sample(whole, **arguments, output="uint8")
    with pytest.raises(ft.NotFiniteError, match="2 of 5 images are not finite") as caught:
        ft.sample(digits(value), **arguments, output="uint8")
    assert isinstance(caught.value, FloatingPointError)
    assert "image 1 (label 7, seed 4), image 3 (label 7, seed 4)" in str(caught.value)
    assert caught.value.numbers == [1, 3]
    good = [0, 2, 4]
    assert caught.value.images[good].equal(expected[good])
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.numbers) == (str(caught.value), [1, 3])


def test_a_seed_that_was_drawn_is_named_and_gives_the_same_images(broken, whole):
    with pytest.raises(ft.NotFiniteError) as caught:
        ft.sample(broken, "E2", [1, 7], output="uint8")
    seed = int(re.search(r"seed (\d+)", str(caught.value))[1])
    assert caught.value.images[0].equal(
        ft.sample(whole, "E2", [1, 7], seed=seed, output="uint8")[0]
    )


def test_many_are_counted_and_not_all_listed(broken):
    with pytest.raises(ft.NotFiniteError, match=f"and {20 - MOST_NAMED} more"):
        ft.sample(broken, "E1", [7] * 20, seed=0, output="uint8")


def test_given_noise_has_no_seed_and_latents_show_nan_themselves(broken):
    noise = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ft.NotFiniteError, match=r"image 1 \(label 7\)"):
        ft.sample(broken, "E1", [1, 7], noise=noise, output="uint8")
    latents = ft.sample(broken, "E1", [1, 7], noise=noise)
    assert latents.isfinite().flatten(1).all(dim=1).tolist() == [True, False]
    with pytest.raises(ft.NotFiniteError, match="1 of 2 images are not finite: image 1:"):
        broken.decode(latents)


def test_float16_that_overflows_is_told_what_to_load():
    model = ft.load("digits", device="cpu", dtype=torch.float16)
    with torch.no_grad():
        model.predictor.blocks[3].mlp.fc2.weight.mul_(3e4)
    with pytest.raises(ft.NotFiniteError, match="overflows in float16, so load it in bfloat16"):
        ft.sample(model, "H1P1", [1, 2], guidance=1.5, seed=0, output="uint8")


def test_edited_and_inpainted_images(broken):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    mask = np.ones((8, 8), bool)
    with pytest.raises(ft.NotFiniteError, match=r"image 1 \(label 7, seed 3\)"):
        ft.edit(broken, "E2", images, [1, 7], seed=3)
    with pytest.raises(ft.NotFiniteError, match=r"image 1 \(label 7, seed 3\)"):
        ft.inpaint(broken, "E2", images, mask, [1, 7], seed=3)


def test_a_source_that_the_vae_makes_nan_of(whole, monkeypatch):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    encoded = torch.tensor([0.0, math.nan]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    monkeypatch.setattr(whole.vae, "encode", lambda images: (encoded, None))
    with pytest.raises(ft.NotFiniteError, match="images 1 have latents with NaN"):
        ft.edit(whole, "E2", images, [1, 7], seed=3)


# Autoencoders


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> DiffusersVAE:
    from flowturbo.models.vae import load_vae

    folder = make_folder(tmp_path_factory.mktemp("vae"))
    return load_vae(folder, torch.device("cpu"), torch.float32)


def test_pixels_that_are_not_finite_though_the_latents_are(autoencoder, monkeypatch):
    latents = torch.randn(4, 4, 4, 4)
    expected, decode = autoencoder.decode(latents), autoencoder.network.decode

    def overflowing(z: Tensor):
        out = decode(z)
        out.sample[-1, 2, 0, 1] = math.inf
        return out

    monkeypatch.setattr(autoencoder.network, "decode", overflowing)
    monkeypatch.setattr("flowturbo.models.vae.DECODE_BYTES", 2 * autoencoder._decode_bytes(4, 4))
    model = digits(label=None)
    model.vae = autoencoder
    for decoded in (autoencoder.decode, model.decode):
        with pytest.raises(
            ft.NotFiniteError, match="image 1, image 3: latents are finite"
        ) as caught:
            decoded(latents)  # in slices of two
        assert caught.value.images[[0, 2]].equal(expected[[0, 2]])


def test_an_infinite_latent_whose_pixels_are_finite(autoencoder, monkeypatch):
    """As tiny autoencoders make them, which bound their latents."""
    model = digits(label=None)
    model.vae = autoencoder
    decode = autoencoder.network.decode
    monkeypatch.setattr(
        autoencoder.network, "decode", lambda z: decode(z.nan_to_num().clamp(-3, 3))
    )
    latents = torch.zeros(3, 4, 4, 4)
    latents[1, 0, 0, 0] = math.inf
    with pytest.raises(ft.NotFiniteError, match="image 1: latents hold NaN or infinity"):
        model.decode(latents)


class Own:
    """A caller's own autoencoder, which gives one buffer at every call."""

    factor = 1

    def __init__(self) -> None:
        self.buffer = torch.zeros(0, dtype=torch.uint8)

    def decode(self, latents: Tensor) -> Tensor:
        images = Pixels().decode(latents.nan_to_num())
        if self.buffer.shape != images.shape:
            self.buffer = torch.empty(images.shape, dtype=torch.uint8)
        return self.buffer.copy_(images)


def test_latents_are_checked_for_any_autoencoder_and_its_buffer_is_copied(whole):
    mine, expected = (
        digits(),
        ft.sample(whole, "E2", [1, 2, 3], seed=0, batch_size=1, output="uint8"),
    )
    mine.vae = Own()
    with pytest.raises(ft.NotFiniteError, match=r"image 1 \(label 7"):
        ft.sample(mine, "E2", [1, 7], seed=0, output="uint8")
    images = ft.sample(mine, "E2", [1, 2, 3], seed=0, batch_size=1, output="uint8")
    assert images.equal(expected)
    first = mine.decode(torch.full((1, 1, 8, 8), -1.0))
    mine.decode(torch.ones(1, 1, 8, 8))
    assert first.max() == 0


# Captured runs


class NoReading(TorchDispatchMode):
    """Values may not be read, since that waits for the device, which a capture may not do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
        return function(*args, **(kwargs or {}))


class Strict(Fake):
    def record(self, run: Callable[[], Tensor]):
        def unread() -> Tensor:
            with pytest.MonkeyPatch.context() as patch, NoReading():
                patch.setattr(Tensor, "tolist", None)
                patch.setattr(Tensor, "cpu", None)
                return run()

        return super().record(unread)


def test_captured_runs_note_it_without_a_read_and_the_next_call_is_whole(whole):
    model = digits(label=None)
    model.captures.recorder = recorder = Strict()
    arguments = dict(plan="H1P1R1", labels=[7, 2], guidance=2.0, seed=0, output="uint8")
    expected = ft.sample(whole, **arguments)
    for _ in range(3):
        assert ft.sample(model, **arguments).equal(expected)
    row = model.predictor.y_embedder.embedding_table.weight[7]
    before = row.clone()
    row[0] = math.nan  # in place: replays read it
    for _ in range(2):
        with pytest.raises(
            ft.NotFiniteError, match=r"1 of 2 .*image 0 \(label 7, seed 0\)"
        ) as caught:
            ft.sample(model, **arguments)
        assert caught.value.images[1].equal(expected[1])
    row.copy_(before)
    assert ft.sample(model, **arguments).equal(expected)
    assert recorder.recorded == 1
    assert model.captures.report()[0].hits == 5


# Sets of images

LABELS = [1, 2, 7, 3, 4, 5, 7, 6]
OPTIONS = dict(guidance=1.5, seed=5, batch_size=2, shard_size=4)


def test_a_set_stops_at_such_images_and_goes_on_with_a_whole_model(broken, whole, tmp_path):
    with pytest.raises(ft.NotFiniteError, match=r"image 6 \(label 7, seed 5\)"):
        generate(broken, "E1", [1, 2, 2, 3, *LABELS[4:]], tmp_path / "a", **OPTIONS)
    assert [p.name for p in (tmp_path / "a").glob("*.npz")] == ["images-00000-of-00002.npz"]
    with pytest.raises(CheckpointError, match="holds no manifest"):
        verify(tmp_path / "a")


def test_a_set_marks_them(broken, whole, tmp_path):
    out = tmp_path / "set"
    with pytest.warns(UserWarning, match=r"image [26] \(label 7, seed 5\)"):
        manifest = generate(broken, "E1", LABELS, out, not_finite="mark", **OPTIONS)
    assert manifest["not_finite"] == [2, 6]
    assert verify(out)["not_finite"] == [2, 6]
    expected = ft.sample(whole, "E1", LABELS, guidance=1.5, seed=5, batch_size=2, output="uint8")
    join(out, tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["not_finite"].tolist() == [2, 6]
        images = torch.from_numpy(arrays["arr_0"])
    good = [0, 1, 3, 4, 5, 7]
    assert images[good].equal(expected[good])
    assert (images[[2, 6]] == torch.tensor(MARK, dtype=torch.uint8)).all()
    for scored in (out, tmp_path / "all.npz"):
        with pytest.raises(CheckpointError, match=r"marked as not finite.*: 2"):
            open_images(scored, "samples")
    with pytest.raises(ValueError, match="earlier run marked as not finite: 2, 6"):
        generate(broken, "E1", LABELS, out, **OPTIONS)
    text = json.loads((out / "manifest.json").read_text())
    text["not_finite"] = [2]
    (out / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="not_finite"):
        verify(out)


def test_whole_sets_know_nothing_of_it(whole, tmp_path):
    generate(whole, "E1", LABELS, tmp_path / "a", not_finite="mark", **OPTIONS)
    generate(whole, "E1", LABELS, tmp_path / "b", **OPTIONS)
    for name in ("manifest.json", "images-00001-of-00002.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "not_finite" not in json.loads((tmp_path / "a" / "manifest.json").read_text())
    with pytest.raises(ValueError, match="not_finite must be 'stop' or 'mark', got 'go'"):
        generate(whole, "E1", LABELS, tmp_path / "c", not_finite="go", **OPTIONS)


def test_images_to_be_scored_are_named(broken):
    images = GeneratedImages(broken, ft.Plan.parse("E1"), 10, 1.5, None, seed=5, batch_size=3)
    images.read(3, 3)
    with pytest.raises(ft.NotFiniteError, match=r"image 7 \(label 7, seed 5\)"):
        images.read(6, 3)


def test_a_velocity_that_is_not_finite(broken):
    with pytest.raises(ft.NotFiniteError, match=r"seed 0\) 7"):
        velocity_curve(broken, guidance=1.5, steps=2, images=10, batch_size=5)


def test_commands_end_with_the_reason(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flowturbo.cli.options.load", lambda *args, **options: broken)
    words = ["sample", "--plan", "E2", "--labels", "1", "7"]
    png, folder = str(tmp_path / "a.png"), str(tmp_path / "set")
    for out in (png, folder):
        assert main([*words, "--out", out]) == 2
        assert "1 of 2 images are not finite: image 1 (label 7, seed 0)" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    assert main([*words, "--out", png, "--not-finite", "mark"]) == 2
    assert "not_finite 'mark' is for a folder" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="they are marked"):
        assert main([*words, "--out", folder, "--not-finite", "mark"]) == 0
    assert main(["verify", folder]) == 0
    assert "1 images are marked as not finite: 1" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_finite_in_every_type_and_layout(dtype, value):
    x = torch.randn(4, 3, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0], x[1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    x[1, 0] = torch.finfo(dtype).max
    x[2, 1, 3, 4] = value
    for layout in (x, x.contiguous(), x[..., None], x.flatten(1), x.permute(0, 3, 1, 2)):
        assert finite_rows(layout).tolist() == [True, True, False, True]
        assert not_finite_rows(layout) == [2]
