"""Models from pipelines of Qwen-Image, Z-Image, FLUX.2 and Wan: as the stock pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from fake_recorder import Fake
from newer_pipelines import FRAMES, KINDS, as_ours, call, conditions, newer, noise_for, transformer
from pipelines import SIZE, diffusers

import flowturbo as ft


def model_from(kind: str, pipe: Any, **options: Any) -> ft.PromptModel:
    frames = {"frames": FRAMES} if kind.startswith("wan") else {}
    return ft.from_pipeline(pipe, image_size=SIZE, **frames, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_e_plans_make_the_latents_of_the_pipeline(kind, guidance):
    pipe = newer(kind)
    model = model_from(kind, pipe)
    noise = noise_for(pipe, model)
    expected = as_ours(kind, pipe, call(kind, pipe, guidance, noise, num_inference_steps=8))
    grid = [1 - level for level in pipe.scheduler.sigmas.tolist()]
    c = conditions(kind)
    latents = ft.sample(model, ft.Plan.parse("E8", grid=grid), c, guidance=guidance, noise=noise)
    assert_close(latents, expected, 2e-6)
    if guidance != 1:
        other = ft.sample(model, ft.Plan.parse("E8", grid=grid), c, noise=noise)
        assert relative_error(other, expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_videos_are_decoded_as_in_the_pipeline(kind):
    pipe = newer(kind)
    model = model_from(kind, pipe)
    noise = noise_for(pipe, model)
    stock = call(kind, pipe, 1.0, noise, num_inference_steps=2, output_type="pt")
    grid = [1 - level for level in pipe.scheduler.sigmas.tolist()]
    made = ft.sample(
        model, ft.Plan.parse("E2", grid=grid), conditions(kind), noise=noise, output="uint8"
    )
    shape = (2, FRAMES, SIZE, SIZE, 3) if kind.startswith("wan") else (2, SIZE, SIZE, 3)
    assert (made.shape, made.dtype) == (shape, torch.uint8)
    expected = 255 * stock.movedim(-3, -1).float()
    assert (made.float() - expected).abs().max() <= 1
    assert expected.std() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_encoded_as_in_the_pipeline(kind):
    pipe = newer(kind)
    vae: Any = model_from(kind, pipe).vae
    seed = torch.Generator().manual_seed(5)
    shape = (2, FRAMES, SIZE, SIZE, 3) if kind.startswith("wan") else (2, SIZE, SIZE, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seed)
    mean, std = vae.encode(images)
    assert std is not None
    pixels = images.float() / 127.5 - 1
    if kind in ("flux2", "klein"):
        expected = pipe._encode_vae_image(pixels.permute(0, 3, 1, 2), None)
    elif kind == "zimage":
        config = pipe.vae.config
        latents = pipe.vae.encode(pixels.permute(0, 3, 1, 2)).latent_dist.mode()
        expected = (latents - config.shift_factor) * config.scaling_factor
    else:
        video = pixels.movedim(-1, 1) if kind != "qwen" else pixels.movedim(-1, 1)[:, :, None]
        latents, config = pipe.vae.encode(video).latent_dist.mode(), pipe.vae.config
        center, spread = (
            torch.tensor(config[name]).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        expected = (latents - center) / spread
        expected = expected[:, :, 0] if kind == "qwen" else expected
    assert_close(mean, expected, 1e-5)
    assert (mean.shape, (std >= 0).all()) == (std.shape, True)
    assert_close(vae.decode(mean).float(), vae.decode(expected).float(), 2e-2)


def test_the_shift_of_flux2_is_that_of_its_pipeline_at_ten_steps():
    pipe = newer("flux2")
    model = model_from("flux2", pipe)
    call("flux2", pipe, 1.0, noise_for(pipe, model), num_inference_steps=10)
    linear = np.linspace(1, 0.1, 10)
    levels = [*(model.shift * linear / (1 + (model.shift - 1) * linear)), 0]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(levels, abs=1e-6)


def test_the_shift_of_wan_is_that_of_its_published_scheduler():
    pipe = newer("wan")
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    assert model_from("wan", pipe).shift == 5.0


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_captured_for_other_prompts_and_batches_are_parts_of_the_whole(kind):
    pipe = newer(kind)
    model = model_from(kind, pipe)
    runs = [(conditions(kind, seed), 1.5 + seed) for seed in range(3)]
    expected = [ft.sample(model, "H1P1", c, guidance=g, seed=4) for c, g in runs]
    part = ft.sample(model, "H1P1", runs[0][0], guidance=1.5, seed=4, batch_size=1)
    assert_close(part, expected[0], 1e-5)
    recorder = model.captures.recorder = Fake()
    for _ in range(2):
        for (c, g), result in zip(runs, expected, strict=True):
            assert_close(ft.sample(model, "H1P1", c, guidance=g, seed=4), result, 1e-5)
    assert (recorder.recorded, recorder.replayed >= 4) == (1, True)
    if "lengths" not in runs[0][0]:
        return
    # The lengths are a part of what is captured: others are another capture.
    shorter = {**runs[0][0], "lengths": torch.tensor([5, 2])}
    own = ft.sample(model, "H1P1", shorter, guidance=1.5, seed=4)
    assert relative_error(own, expected[0]) > 1e-4
    for _ in range(2):
        assert_close(ft.sample(model, "H1P1", shorter, guidance=1.5, seed=4), own, 1e-5)
    assert recorder.recorded == 2
    # Rows without padding are as if they had never had any.
    alone = {"embeds": shorter["embeds"][1:, :2], "negative_embeds": shorter["negative_embeds"][1:]}
    noise = ft.noise(model.latent_shape, 4, [1])
    assert_close(ft.sample(model, "H1P1", alone, guidance=1.5, noise=noise), own[1:], 1e-5)


@pytest.mark.parametrize("kind", ["qwen", "zimage", "flux2"])
def test_images_are_edited_and_inpainted(kind):
    pipe = newer(kind)
    model = model_from(kind, pipe)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    c = conditions(kind)
    changed = ft.edit(model, "H1P1", images, c, strength=0.5, guidance=2.0, seed=1)
    assert changed.shape == (2, SIZE, SIZE, 3)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[:, : SIZE // 2] = True
    inpainted = ft.inpaint(model, "H1P1", images, mask, c, guidance=2.0, seed=1)
    assert np.array_equal(inpainted[:, :, SIZE // 2 :], images[:, :, SIZE // 2 :])


def test_what_does_not_fit_is_refused(tmp_path):
    model, c = model_from("qwen", newer("qwen")), conditions("qwen")
    for lengths in (torch.tensor([5, 6]), torch.tensor([0, 3]), torch.tensor([[5, 3]])):
        with pytest.raises(ValueError, match="lengths must be whole numbers"):
            ft.sample(model, "E1", {**c, "lengths": lengths})
    with pytest.raises(ValueError, match="frames must be left out for a model of images, got 5"):
        ft.from_pipeline(newer("qwen"), image_size=SIZE, frames=5)
    with pytest.raises(ValueError, match="image_size must be multiples of 4"):
        ft.from_pipeline(newer("wan"), image_size=SIZE + 2)
    video, c = model_from("wan", newer("wan")), conditions("wan")
    images = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="videos can be neither edited nor inpainted"):
        ft.edit(video, "H1", images, c)
    with pytest.raises(ValueError, match=r"\(images, channels, frames, height, width\)"):
        ft.sample(video, "E1", c, noise=torch.zeros(2, 4, 16, 16))
    distilled = newer("klein", is_distilled=True)
    with pytest.raises(ValueError, match="guidance must be 1 for this model"):
        ft.sample(model_from("klein", distilled), "E1", conditions("klein"), guidance=2.0)
    with pytest.raises(ValueError, match="reads 9 channels and makes 4"):
        ft.from_pipeline(newer("wan", transformer("wan", in_channels=9)))
    for kind, name in (("qwen", "QwenImageEditPipeline"), ("flux2", "Flux2KleinKVPipeline")):
        pipe = newer(kind)
        pipe.__class__ = type(name, (type(pipe),), {})
        with pytest.raises(ValueError, match=f"{name} gives its network images beside the latents"):
            ft.from_pipeline(pipe)


def test_one_network_of_wan_2_2_takes_over_from_the_other():
    """Rows at times of both, too, as in training."""
    pipe = newer("wan22")
    model = model_from("wan22", pipe)
    network: Any = model.predictor
    x, t = noise_for(pipe, model), torch.tensor([0.1, 0.9])
    y = {"embeds": conditions("wan22")["embeds"]}
    with torch.no_grad():
        both = network(x, t, y)
        for row, part in enumerate((pipe.transformer, pipe.transformer_2)):
            rows = slice(row, row + 1)
            time = 1000 * (1 - t[rows])
            expected = -part(x[rows], time, y["embeds"][rows], return_dict=False)[0]
            assert_close(both[rows], expected, 1e-6)
            assert_close(network.at(float(t[row]))(x[rows], t[rows], {"embeds": y["embeds"][rows]}),
                         expected, 1e-6)  # fmt: skip


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_refiners_of_published_networks_are_small(depth):
    """At the sizes of their published weights."""
    with torch.device("meta"):
        for name, config in (
            ("QwenImageTransformer2DModel", {}),
            ("ZImageTransformer2DModel", {}),
            ("Flux2Transformer2DModel", {}),
            ("WanTransformer3DModel", {}),
        ):
            teacher = getattr(diffusers, name)(**config)
            refiner: Any = ft.refiner_for(teacher, depth)
            assert refiner.config.in_channels == 2 * teacher.config.in_channels
            share = sum(p.numel() for p in refiner.parameters()) / sum(
                p.numel() for p in teacher.parameters()
            )
            assert share < 0.08 * depth, (name, share)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_refiner_passes_the_velocity_on_and_lives_in_a_folder(kind, tmp_path):
    pipe = newer(kind)
    refiner: Any = ft.refiner_for(pipe.transformer)
    refiner.save_pretrained(tmp_path)
    refined = model_from(kind, pipe, refiner=tmp_path)
    noise, c = noise_for(pipe, refined), conditions(kind)
    with torch.no_grad():
        y = {name: value for name, value in c.items() if "negative" not in name}
        y |= {"embedded_guidance": torch.ones(2)} if kind == "flux2" else {}
        network: Any = refined.refiner
        assert network(noise, torch.tensor([0.2, 0.9]), y, noise).eq(0).all()


def test_modules_that_wan_keeps_in_float32_stay_so():
    """As when diffusers loads them in 16 bits."""
    pipe = newer("wan")
    model = model_from("wan", pipe, refiner=ft.refiner_for(pipe.transformer), dtype=torch.bfloat16)
    for network in (pipe.transformer, model.refiner.module):  # type: ignore[union-attr]
        dtypes = {name: p.dtype for name, p in network.named_parameters()}
        assert dtypes["scale_shift_table"] == torch.float32
        assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        assert dtypes["blocks.0.norm2.weight"] == torch.float32
        assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert (model.dtype, pipe.transformer.dtype) == (torch.bfloat16, torch.bfloat16)
    assert ft.sample(model, "H1R1", conditions("wan"), guidance=2.0, seed=0).isfinite().all()
