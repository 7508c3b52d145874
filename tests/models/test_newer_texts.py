"""Prompts as texts for Qwen-Image, Z-Image, FLUX.2 Klein and Wan; and models from folders."""

from __future__ import annotations

from typing import Any

import complete_newer
import pytest
import torch
from close import assert_close, relative_error
from complete_newer import KINDS
from newer_pipelines import FRAMES, as_ours, noise_for
from pipelines import SIZE

import flowturbo as ft


def model_from(kind: str, pipe: Any, **options: Any) -> ft.PromptModel:
    frames = {"frames": FRAMES} if kind.startswith("wan") else {}
    return ft.from_pipeline(pipe, image_size=SIZE, **frames, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_make_what_they_make_in_the_pipeline(kind, tmp_path):
    """Loaded from a folder, whole; with prompts of other lengths."""
    model = model_from(kind, complete_newer.saved(kind, tmp_path), device="cpu")
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)
    texts, against = ["a cat", "two dogs, one of them brown"], ["", "blurry"]
    noise, more = noise_for(pipe, model), {}
    start = noise
    if kind == "qwen":
        start = pipe._pack_latents(noise[:, None], *noise.shape)
        more = {"true_cfg_scale": 3.0, "negative_prompt": against}
    elif kind == "zimage":
        more = {"guidance_scale": 2.0, "negative_prompt": against}
    elif kind == "klein":  # whose negative prompt is always empty
        more, against = {"guidance_scale": 3.0}, ["", ""]
    else:
        more = {"guidance_scale": 3.0, "negative_prompt": against, "num_frames": FRAMES}
    stock = pipe(
        prompt=list(texts), latents=start, height=SIZE, width=SIZE, num_inference_steps=3,
        output_type="latent", **more,
    )[0]  # fmt: skip
    plan = ft.Plan.parse("E3", grid=[1 - level for level in pipe.scheduler.sigmas.tolist()])
    encoded = model.encode(texts, against)
    assert ("lengths" in encoded) == (kind in ("qwen", "zimage"))
    latents = ft.sample(model, plan, texts, negative=against, guidance=3.0, noise=noise)
    assert_close(latents, as_ours(kind, pipe, stock), 5e-6)
    assert latents.equal(ft.sample(model, plan, encoded, guidance=3.0, noise=noise))
    alone = ft.sample(model, plan, texts[:1], negative="", guidance=3.0, noise=noise[:1])
    assert_close(alone, latents[:1], 1e-5)
    other = ft.sample(model, plan, texts, negative=against, guidance=1.5, noise=noise)
    assert relative_error(other, latents) > 1e-3


def test_both_networks_of_wan_2_2_are_loaded_and_cast(tmp_path):
    folder = complete_newer.saved("wan22", tmp_path)
    model = model_from("wan22", folder, device="cpu", dtype=torch.float64)
    network: Any = model.predictor
    assert network.boundary == 0.6
    assert network.low.module is model.pipe.transformer_2
    for part in (model.pipe.transformer, model.pipe.transformer_2):
        assert {p.dtype for p in part.parameters()} == {torch.float64}


def test_the_command_line_makes_images_of_texts_and_no_videos(tmp_path, capsys):
    from flowturbo.cli.main import main

    command = ["sample", "--prompts", "a cat", "--image-size", "32", "--device", "cpu"]
    image = tmp_path / "cat.png"
    folder = complete_newer.saved("zimage", tmp_path)
    assert main([*command, "--model", str(folder), "--plan", "A2", "--guidance", "2",
                 "--out", str(image)]) == 0  # fmt: skip
    assert image.is_file()
    folder = complete_newer.saved("wan", tmp_path)
    assert main([*command, "--model", str(folder), "--out", str(tmp_path / "no.png")]) != 0
    assert "model must make images" in capsys.readouterr().err
