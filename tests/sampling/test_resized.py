"""Class-conditional models at other sizes: their images, the noise of seeds, sets and commands."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close
from scipy.fft import dctn
from sized_models import BOTH, GREY, LABELS, Program, low_frequencies, model_of, noise
from tiny import CONFIG, random_sit
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.demo.session import PICTURES, DemoSession, Request
from flowturbo.evaluation.image_sets import GeneratedImages
from flowturbo.evaluation.velocity import trajectory_velocities, velocity_curve
from flowturbo.models.checkpoint import save_sit
from flowturbo.runtime import rng
from flowturbo.sampling.digests import _config
from flowturbo.sampling.generate import generate
from flowturbo.sampling.inputs import noise_of

TWO = "H1P1 at 1/2 + H1A1 from 0.6"


@pytest.mark.parametrize("side", [4, 12])
def test_another_size_is_that_of_an_independent_program(side):
    model = model_of(replace(BOTH, sides=(4, 12)), torch.float64).resized(side)
    start = noise(side=side)
    found = ft.sample(model, "H1P1R1", LABELS, noise=start, guidance=1.5)
    expected, _ = Program(model, LABELS, 1.5).run(start, "HPR", [0, 1 / 3, 2 / 3, 1])
    assert_close(found, expected, 1e-12)


# Sizes.


def test_a_seed_gives_one_composition_at_every_size():
    model = model_of()
    drawn = rng.noise((4, 8, 8), 5, range(3))
    for side in (4, 16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resized = model.resized(side)
        by_seed = ft.sample(resized, "E2", LABELS, seed=5)
        start = ft.resized_noise(drawn, side)
        assert by_seed.equal(ft.sample(resized, "E2", LABELS, noise=start))
        low = min(side, 8)
        assert_close(
            low_frequencies(start.double(), low), low_frequencies(drawn.double(), low), 1e-6
        )


def test_measurements_and_the_demo_draw_the_noise_of_sample():
    """At another size too, where it is not noise of the latents' shape."""
    model = model_of(GREY, vae="pixels").resized(4)
    expected = ft.sample(model, "H1", range(3), seed=5, output="uint8", guidance=1.5)
    made = GeneratedImages(model, ft.Plan.parse("H1"), 3, 1.5, None, 5, 3)
    assert np.array_equal(made.read(0, 3), expected.numpy())
    session = DemoSession(model, {"H1": None})
    try:
        request = Request("H1", "H1", "cycle", 1, seed=5, guidance=1.5)
        shown = session.picture(request, 2)
    finally:
        session.close()
    number = PICTURES + 2
    own = noise_of(model, 5, range(number, number + 1))
    again = ft.sample(model, "H1", 2, noise=own, guidance=1.5, output="uint8")
    assert np.array_equal(shown, again[0].numpy())
    by = dict(guidance=1.5, steps=2, batch_size=3)
    curve = velocity_curve(model, images=3, **by)
    v = trajectory_velocities(
        model, ft.Plan.parse("H2"), torch.arange(3), noise_of(model, 0, range(3)), 1.5
    ).flatten(2)
    change = (v[1:] - v[:-1]).norm(dim=2) / v[:-1].norm(dim=2)
    assert curve["change"]["mean"] == pytest.approx(change.double().mean(1).tolist(), rel=1e-5)


def test_resized_noise_is_white_and_each_image_has_its_own():
    """Variances of 40,000 numbers and more: 5 standard errors."""
    drawn = rng.noise((4, 8, 8), 1, range(200))
    for size in ((16, 16), (4, 4), (4, 16), (24, 12)):
        larger = ft.resized_noise(drawn, size)
        assert larger.shape == (200, 4, *size)
        assert larger.dtype == torch.float32
        spectrum = dctn(larger.double().numpy(), axes=(2, 3), norm="ortho")
        error = 5 * (2 / spectrum[:, :, 0, 0].size) ** 0.5
        assert np.abs((spectrum**2).mean(axis=(0, 1)) - 1).max() < error
        neighbours = (larger[..., 1:] * larger[..., :-1]).mean()
        assert abs(float(neighbours)) < 5 / larger.numel() ** 0.5
        rows = torch.randperm(200)[:7]
        assert ft.resized_noise(drawn[rows], size).equal(larger[rows])
    assert ft.resized_noise(drawn, (8, 8)).equal(drawn)
    assert ft.resized_noise(drawn.double(), 16).dtype == torch.float64


def test_a_small_stage_of_a_larger_image_starts_as_the_small_image_does():
    drawn = rng.noise((4, 4, 4), 2, range(3))
    again = ft.resized_noise(ft.resized_noise(drawn, 8), 4)
    assert_close(again, drawn, 1e-6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(1, 4, 8, 8), 0), ValueError, "size must be at least 1"),
        ((torch.zeros(1, 4, 8, 8), 2.0), TypeError, "size must be a whole number"),
        ((torch.zeros(1, 4, 8, 8), (1, 2, 3)), ValueError, "size must be a number or two"),
        ((torch.zeros(4, 8, 8), 4), ValueError, "noise must be a floating-point tensor"),
        ((torch.zeros(1, 4, 8, 8, dtype=torch.int32), 4), ValueError, "noise must be a floating"),
        ((np.zeros((1, 4, 8, 8)), 4), ValueError, "noise must be a floating-point tensor"),
    ],
)
def test_noise_that_can_not_be_resized(arguments, error, message):
    with pytest.raises(error, match=message):
        ft.resized_noise(*arguments)


def test_what_a_resized_model_is():
    model = model_of(GREY, vae="pixels")
    small = model.resized(4)
    assert (small.latent_shape, model.latent_shape) == ((1, 4, 4), (1, 8, 8))
    assert small.predictor is model.predictor
    assert small.captures is model.captures
    assert small.sides == model.sides == (8, 4)
    assert small.macs == (GREY.macs(4), GREY.refiner().macs(4))
    images = ft.sample(small, "E1", LABELS, seed=0, output="uint8")
    assert images.shape == (3, 4, 4, 3)
    small.macs = model.macs = 5, 7
    assert (small.resized(4) is small, model.resized(8) is model) == (True, True)
    assert small.macs == model.macs == (5, 7)  # as somebody has set them
    assert small.resized(8).drawn is None
    loaded = ft.load(random_sit(GREY, 0), vae="pixels", device="cpu", image_size=4)
    assert ft.sample(loaded, "A2", LABELS, seed=0).equal(ft.sample(small, "A2", LABELS, seed=0))
    with pytest.warns(UserWarning, match=r"image_size \(6, 12\) is none that .* \(4, 8\)"):
        wide = model.resized((6, 12))
    assert ft.sample(wide, "E1", LABELS, seed=0, output="uint8").shape == (3, 6, 12, 3)
    edited = ft.edit(small, "A2", images, 3, strength=0.5, seed=0)
    assert edited.shape == (3, 4, 4, 3)


class Eightfold:
    """A stand-in for an autoencoder: 8 pixels a side of a latent."""

    factor, channels = 8, 4

    def decode(self, latents: Tensor) -> Tensor:
        images = latents[:, :3].permute(0, 2, 3, 1).clamp(0, 1)
        return (255 * images).to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


def test_sizes_are_in_pixels():
    model = model_of(vae=Eightfold())
    assert model.resized(32).latent_shape == (4, 4, 4)
    assert ft.sample(model.resized(32), "E1", [1], seed=0, output="uint8").shape == (1, 32, 32, 3)
    with pytest.warns(UserWarning, match=r"image_size 96 is none .* \(32, 64\)"):
        model.resized(96)
    with pytest.raises(ValueError, match="multiple of 16 for this model, got 24"):
        model.resized(24)


@pytest.mark.parametrize(
    "size, error, message",
    [
        (5, ValueError, "image_size must be a multiple of 2 for this model, got 5"),
        (0, ValueError, "image_size must be at least 1"),
        (4.0, TypeError, "image_size must be a whole number"),
        ((4, 4, 4), ValueError, "image_size must be a number or two"),
    ],
)
def test_sizes_that_do_not_fit(size, error, message):
    with pytest.raises(error, match=message):
        model_of().resized(size)


class Plain(nn.Module):
    """A network of somebody else's, of any size."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        return -x


def test_networks_of_others_have_the_sizes_that_the_model_names():
    model = replace(model_of(), predictor=Plain(), refiner=None, sides=())
    with pytest.raises(ValueError, match="image_size must be the model's own for a network"):
        model.resized(4)
    with pytest.raises(ValueError, match="This one was trained on latents of 8 x 8, and a stage"):
        ft.sample(model, TWO, LABELS, seed=0)
    model.sides = (4,)
    assert ft.sample(model.resized(4), "E1", LABELS, seed=0).shape == (3, 4, 4, 4)
    assert ft.sample(model, TWO, LABELS, seed=0).shape == (3, 4, 8, 8)


# Sets of images, and the command line.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    save_sit(folder / "model.safetensors", random_sit(GREY, 0), vae="pixels")
    return folder


def test_a_set_is_made_by_stages_and_resumed(tmp_path):
    model = model_of(GREY, vae="pixels")
    options: Any = dict(guidance=1.5, seed=3, batch_size=2, shard_size=2)
    manifest = generate(model, TWO, LABELS, tmp_path, **options)
    assert manifest["settings"]["sizes"] == [[4, 4], [8, 8]]
    shards = sorted(tmp_path.glob("images-*.npz"))
    stored = np.concatenate([np.load(path)["arr_0"] for path in shards])
    expected = ft.sample(model, TWO, LABELS, guidance=1.5, seed=3, batch_size=2, output="uint8")
    assert np.array_equal(stored, expected.numpy())
    shards[0].unlink()
    assert generate(model, TWO, LABELS, tmp_path, **options) == manifest


def test_what_a_set_says_of_a_network_is_what_it_said_before_there_were_sizes():
    """So that sets of before are resumed."""
    assert _config(random_sit(CONFIG, 0)) == (
        "SiTConfig(hidden=48, depth=2, heads=2, patch=2, side=8, channels=4, num_classes=10, "
        "learned_sigma=False, reads_velocity=False, null_row=True)"
    )
    assert "sides=(4,)" in _config(random_sit(BOTH, 0))


def test_a_set_of_another_size_is_another_set(tmp_path):
    model = model_of(GREY, vae="pixels")
    options: Any = dict(seed=3, batch_size=2, shard_size=2)
    manifest = generate(model.resized(4), "A2", LABELS, tmp_path, **options)
    assert generate(model.resized(4), "A2", LABELS, tmp_path, **options) == manifest
    stored = np.concatenate([np.load(p)["arr_0"] for p in sorted(tmp_path.glob("images-*.npz"))])
    expected = ft.sample(model.resized(4), "A2", LABELS, seed=3, batch_size=2, output="uint8")
    assert np.array_equal(stored, expected.numpy())
    (tmp_path / "images-00000-of-00002.npz").unlink()
    with pytest.raises(ValueError, match=r"was .* and is now"):
        generate(model, "A2", LABELS, tmp_path, **options)


def run(*words: str) -> int:
    return main(["sample", "--device", "cpu", "--seed", "3", "--guidance", "1.5", *words])


@pytest.mark.parametrize(
    "words, plan, size",
    [
        (["--plan", "A2 at 1/2 + A1 from 0.6"], "A2 at 1/2 + A1 from 0.6", 8),
        (["--plan", "A2", "--image-size", "4"], "A2", 4),
    ],
)
def test_the_command_makes_the_images_of_sample(files, tmp_path, words, plan, size):
    path, out = str(files / "model.safetensors"), tmp_path / "images.npz"
    assert run("--model", path, "--labels", "3", "7", "--out", str(out), *words) == 0
    model = ft.load(path, device="cpu").resized(size)
    expected = ft.sample(model, plan, [3, 7], seed=3, guidance=1.5, output="uint8")
    assert np.array_equal(np.load(out)["arr_0"], expected.numpy())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--image-size", "5"], "image_size must be a multiple of 2"),
        (["--plan", "A2 at 1/4 + A1 from 0.6"], "and a stage needs 2 x 2"),
    ],
)
def test_the_command_refuses(files, tmp_path, capsys, words, message):
    path = str(files / "model.safetensors")
    assert run("--model", path, "--out", str(tmp_path / "x.png"), *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
