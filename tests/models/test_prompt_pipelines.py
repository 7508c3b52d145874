"""Text-to-image models from pipelines: texts, images to edit, and what is refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from pipelines import (
    SIZE,
    sd3,
)
from prompt_models import KINDS, conditioning, loaded, model_of, noise_of

import flowturbo as ft
from flowturbo.models.pipelines import is_pipeline, load_pipeline
from flowturbo.storage.files import CheckpointError


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_encoded_as_the_pipeline_does(kind, pipeline_folders):
    model = loaded(pipeline_folders, kind)
    texts, against = ["a cat", "two dogs, one cat"], ["", "blurry"]
    encoded = model.encode(texts, against)
    pipe = load_pipeline(pipeline_folders[kind])
    if kind == "sd3":
        expected = pipe.encode_prompt(texts, None, None, negative_prompt=against)
        names = ["embeds", "negative_embeds", "pooled", "negative_pooled"]
    elif kind == "flux":
        expected = pipe.encode_prompt(texts, None)[:2]
        names = ["embeds", "pooled"]
    else:
        expected = pipe.encode_prompt(texts, "cpu", 1, True, against)
        names = ["embeds", "negative_embeds"]
    assert encoded.keys() == set(names)
    for name, value in zip(names, expected, strict=True):
        assert_close(encoded[name], value, 1e-5)
    guidance = 2.0
    images = ft.sample(
        model,
        "H1P1",
        texts,
        guidance=guidance,
        seed=3,
        negative=None if kind == "flux" else against,
        output="uint8",
    )
    assert images.shape == (2, SIZE, SIZE, 3)
    assert images.equal(
        ft.sample(model, "H1P1", encoded, guidance=guidance, seed=3, output="uint8")
    )
    assert model.encode("a cat")["embeds"].shape == encoded["embeds"][:1].shape


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_edited_and_inpainted_by_prompts(kind, pipeline_folders):
    model = loaded(pipeline_folders, kind)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    changed = ft.edit(model, "H1P2", images, "a cat", strength=0.5, guidance=1.5, seed=1)
    assert changed.shape == (2, SIZE, SIZE, 3)
    source = model.vae.encode(torch.from_numpy(images))[0]  # type: ignore[union-attr]
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[:, : SIZE // 2] = True
    half = SIZE // 4
    latents = ft.inpaint(
        model, "H1P2", images, mask, ["a cat", "a dog"], guidance=1.5, seed=1, output="latents"
    )
    assert latents[..., half:].equal(source[..., half:])
    assert relative_error(latents[..., :half], source[..., :half]) > 0.1
    inpainted = ft.inpaint(model, "H1P2", images, mask, ["a cat", "a dog"], guidance=1.5, seed=1)
    assert np.array_equal(inpainted[:, :, SIZE // 2 :], images[:, :, SIZE // 2 :])
    with pytest.raises(
        ValueError, match=r"images must be one or as many as there are of the other \(3\), got 2"
    ):
        ft.edit(model, "H1", images, ["a", "b", "c"])


def test_a_pipeline_is_loaded_by_folder_part_by_part(pipeline_folders, tmp_path):
    assert load_pipeline(pipeline_folders["2rf"], ("text",)).unet is None
    shell = load_pipeline(pipeline_folders["sd3"], ("text", "vae"))
    assert shell.transformer.device.type == "meta"
    assert load_pipeline(pipeline_folders["flux"], ("network",)).text_encoder is None
    assert is_pipeline(pipeline_folders["sd3"])
    assert is_pipeline("stabilityai/stable-diffusion-3.5-medium")
    assert not any(
        map(is_pipeline, ("digits", "model.pt", "SiT-XL/2.pt", str(tmp_path / "model.safetensors")))
    )
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        ft.from_pipeline(tmp_path)
    model = loaded(pipeline_folders, "sd3", dtype=torch.float64)
    assert {p.dtype for p in model.predictor.parameters()} == {torch.float64}  # type: ignore[attr-defined]
    assert ft.sample(model, "E1", "a cat", noise=noise_of(model, 1).double()).dtype == torch.float64


def test_a_name_without_a_network_fails_soon_and_says_so(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.hf_api.api, "endpoint", "http://127.0.0.1:9")  # where nobody answers
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"model 'org/name' .* can't be had from the hub: .*\w"):
        load_pipeline("org/name")
    assert time.perf_counter() - began < 12


def test_weights_in_pickles_or_damaged_are_refused(pipeline_folders, tmp_path):
    import shutil

    shutil.copytree(pipeline_folders["2rf"], tmp_path / "m")
    weights = tmp_path / "m/unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="can't be loaded"):
        ft.from_pipeline(tmp_path / "m", convention="2-rf")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        ft.from_pipeline(tmp_path / "m", convention="2-rf")


def test_what_is_no_flow_model_or_does_not_fit_is_refused(pipeline_folders):
    with pytest.raises(ValueError, match="convention='2-rf' must be given for a UNet"):
        ft.from_pipeline(pipeline_folders["2rf"])
    with pytest.raises(TypeError, match="with a transformer or a unet, got int"):
        ft.from_pipeline(3)
    for kind, size in (
        ("2rf", SIZE + 2),
        ("sd3", SIZE + 2),
        ("flux", (SIZE, SIZE + 2)),
        ("sd3", 4096),
    ):
        with pytest.raises(ValueError, match="image_size must be multiples of 4, at most"):
            ft.from_pipeline(
                pipeline_folders[kind],
                convention="2-rf" if kind == "2rf" else "auto",
                image_size=size,
                device="cpu",
            )


def test_prompts_that_do_not_fit_are_refused(pipeline_folders):
    model, c = model_of("sd3"), conditioning("sd3")
    text = loaded(pipeline_folders, "sd3")
    for prompts, options, kind, message in (
        ({k: v for k, v in c.items() if k != "pooled"}, {}, ValueError, "lack pooled"),
        (
            {k: v for k, v in c.items() if "negative" not in k},
            {"guidance": 2.0},
            ValueError,
            "lack negative_embeds, negative_pooled",
        ),
        ({**c, "pooled": c["pooled"][:1]}, {}, ValueError, "as many rows of each kind"),
        (c, {"negative": "x"}, ValueError, "negative must be encoded with the prompts"),
        ("a cat", {}, ValueError, "made from a pipeline with its text encoders"),
        (None, {}, ValueError, "labels must be prompts"),
        ([], {}, ValueError, "at least one text"),
        ([3], {}, ValueError, "at least one text"),
        (3, {}, TypeError, "must be texts for a text-to-image model, got int"),
        (
            torch.tensor([1, 2]),
            {},
            TypeError,
            "must be texts for a text-to-image model, got Tensor",
        ),
    ):
        with pytest.raises(kind, match=message):
            ft.sample(model, "E1", prompts, **options)
    with pytest.raises(ValueError, match=r"negative must be one text or one a prompt \(1\), got 2"):
        ft.sample(text, "E1", "a cat", negative=["x", "y"], guidance=2.0)
    with pytest.raises(TypeError, match="unexpected arguments"):
        ft.sample(ft.load("digits", device="cpu"), "E1", [3], negative="x")
    with pytest.raises(ValueError, match="loaded without refiner"):
        ft.sample(model, "H1R1", c)


def test_a_pipeline_whose_weights_are_offloaded_is_refused_and_keeps_a_users_refiner():
    pipe = sd3()
    refiner = ft.refiner_for(pipe.transformer)
    pipe.transformer.to("meta")
    with pytest.raises(ValueError, match="SD3Transformer2DModel are offloaded"):
        ft.from_pipeline(pipe, refiner)
    assert all(not weight.is_meta for weight in refiner.parameters())
