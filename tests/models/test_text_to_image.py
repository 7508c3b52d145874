"""Text-to-image models in our convention: 2-RF, SD3 and FLUX from pipelines, with their guidance,
shift and refiners.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from close import assert_close, relative_error
from fake_recorder import Fake
from pipelines import (
    SIZE,
    call,
    diffusers,
    embeds,
    flux,
    flux_transformer,
    negative,
    sd3,
    sd3_transformer,
    unet,
)
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.models.pipelines import is_pipeline, load_pipeline
from flowturbo.models.text_to_image import PromptNetwork, packed, unpacked
from flowturbo.storage.files import CheckpointError

KINDS = ("2rf", "sd3", "flux")
NETWORKS = {"2rf": unet, "sd3": sd3_transformer, "flux": flux_transformer}


def randomised(module: nn.Module, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.02 if parameter.ndim == 1 else 0.3 / parameter[0].numel() ** 0.5
        parameter.data = scale * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        ).to(parameter)
    return module.requires_grad_(False).eval()


def model_of(kind: str, refined: bool = False, **network: Any) -> ft.PromptModel:
    """Without text encoders."""
    module = NETWORKS[kind](**network)
    refiner = randomised(ft.refiner_for(module)) if refined else None
    if kind == "2rf":
        pipe = diffusers.StableDiffusionPipeline(
            vae=pipelines.vae(), text_encoder=None, tokenizer=None, unet=module,
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        return ft.from_pipeline(pipe, refiner, convention="2-rf")
    pipe = sd3(transformer=module) if kind == "sd3" else flux(transformer=module)
    return ft.from_pipeline(pipe, refiner, image_size=SIZE)


def told(kind: str, seed: int = 0, count: int = 2) -> dict[str, Tensor]:
    """Encoded prompts as our models take them."""
    values = embeds(seed, count) | negative(seed + 9, count)
    named = {
        name.replace("prompt_embeds", "embeds").replace("pooled_embeds", "pooled"): value
        for name, value in values.items()
    }
    return {name: value for name, value in named.items() if kind != "2rf" or "pooled" not in name}


def noise_of(model: ft.PromptModel, count: int = 2, seed: int = 1) -> Tensor:
    return ft.noise(model.latent_shape, seed, range(count))


def by_hand(
    kind: str,
    module: Any,
    x: Tensor,
    t: float,
    c: dict[str, Tensor],
    v: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The velocity, data - noise, that each kind's own code makes of its network, one half at a
    time.
    """
    level, N = 1 - t, len(x)
    given = x if v is None else torch.cat([x, v], 1)
    if kind == "2rf":
        return module(
            given, torch.full((N,), 1000 * level), encoder_hidden_states=c["embeds"]
        ).sample
    if kind == "sd3":
        out = module(given, c["embeds"], c["pooled"], torch.full((N,), 1000 * level)).sample
        return -out
    _, _, H, W = x.shape
    pipe = diffusers.FluxPipeline
    ids = pipe._prepare_latent_image_ids(N, H // 2, W // 2, torch.device("cpu"), torch.float32)
    tokens = pipe._pack_latents(given, N, given.shape[1], H, W)
    scale = torch.full((N,), guidance) if module.config.guidance_embeds else None
    zeros = torch.zeros(c["embeds"].shape[1], 3)
    out = module(
        tokens, c["embeds"], c["pooled"], torch.full((N,), level), ids, zeros, scale
    ).sample
    return -pipe._unpack_latents(out, 8 * H, 8 * W, 8)


def loop(
    kind: str,
    model: Any,
    plan: str,
    grid: list[float],
    x: Tensor,
    c: dict[str, Tensor],
    guidance: float,
) -> Tensor:
    """E, H, P and R over the modules, guided by two calls in turn where the kind has halves."""
    halves = kind != "flux" and guidance != 1

    def run(module: Any, x: Tensor, t: float, v: Tensor | None = None) -> Tensor:
        found = by_hand(
            kind, module, x, t, {k: c[k] for k in c if "negative" not in k}, v, guidance
        )
        if not halves:
            return found
        u = by_hand(
            kind, module, x, t, {k.removeprefix("negative_"): c[k] for k in c if "negative" in k}, v
        )
        return u + guidance * (found - u)

    cache: Any = None
    predictor, refiner = model.predictor.module, model.refiner and model.refiner.module
    for letter, a, b in zip(plan, grid, grid[1:], strict=False):
        h = b - a
        if letter == "E":
            x, cache = x + h * run(predictor, x, a), None
            continue
        if letter == "R":
            d = cache + run(refiner, x, a, cache)
            later = d + run(refiner, x + h * d, b, cache)
        else:
            d = run(predictor, x, a) if letter == "H" or cache is None else cache
            later = run(predictor, x + h * d, b)
        x, cache = x + h / 2 * (d + later), d if letter == "R" else later
    return x


# The networks.


def test_packing_is_diffusers_own():
    x = torch.randn(2, 3, 8, 12)
    tokens = packed(x)
    assert tokens.equal(diffusers.FluxPipeline._pack_latents(x, 2, 3, 8, 12))
    assert unpacked(tokens, 8, 12).equal(x)


@pytest.mark.parametrize("kind", KINDS)
def test_time_and_sign_are_ours(kind):
    """Rows at different times; what the kind's own code makes of it is `by_hand`."""
    module = NETWORKS[kind]()
    network = PromptNetwork(module)
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([0.15, 0.8]), told(kind)
    c = {name: value for name, value in c.items() if "negative" not in name}
    more = {"embedded_guidance": torch.full((2,), 2.5)} if kind == "flux" else {}
    made = network(x, t, {**c, **more})
    for i in range(2):
        mine = {name: value[i : i + 1] for name, value in c.items()}
        assert_close(
            made[i : i + 1],
            by_hand(kind, module, x[i : i + 1], float(t[i]), mine, guidance=2.5),
            1e-5,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plan", "guidance"), [("EEE", 1.0), ("HPP", 3.0), ("HPR", 2.0), ("HRPR", 1.0)]
)
def test_plans_are_loops_over_the_modules(kind, plan, guidance):
    model = model_of(kind, refined="R" in plan)
    grid = [0.0, 0.2, 0.55, 0.8, 1.0] if len(plan) == 4 else [0.0, 0.3, 0.7, 1.0]
    x, c = noise_of(model), told(kind)
    made = ft.sample(model, ft.Plan.parse(plan, grid=grid), c, guidance=guidance, noise=x)
    with torch.no_grad():
        expected = loop(kind, model, plan, grid, x, c, guidance)
        assert_close(made, expected, 2e-5)
        if "R" in plan:
            assert (
                relative_error(
                    loop(kind, model, plan.replace("R", "P"), grid, x, c, guidance), expected
                )
                > 1e-3
            )


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_e_plans_make_the_latents_of_the_pipeline(kind):
    """On the noise levels that its scheduler took, which a plan takes as its grid."""
    pipe = sd3() if kind == "sd3" else flux()
    expected = call(pipe, num_inference_steps=5, guidance_scale=3.0)
    grid = [1 - level for level in pipe.scheduler.sigmas.tolist()]
    model = ft.from_pipeline(pipe, image_size=SIZE)
    shape = (1, *model.latent_shape)
    noise = torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    )
    c = {
        k.replace("prompt_embeds", "embeds").replace("pooled_embeds", "pooled"): v
        for k, v in (embeds() | negative()).items()
    }
    made = ft.sample(model, ft.Plan.parse("E5", grid=grid), c, guidance=3.0, noise=noise)
    assert_close(made, unpacked(expected, *shape[2:]) if kind == "flux" else expected, 1e-5)


def test_plans_as_text_run_on_the_models_own_shift():
    model = model_of("sd3")
    assert model.shift == 3.0
    x, c = noise_of(model), told("sd3")
    own = ft.sample(model, "H1P2", c, noise=x)
    assert own.equal(ft.sample(model, ft.Plan.parse("H1P2", shift=3.0), c, noise=x))
    assert relative_error(ft.sample(model, ft.Plan.parse("H1P2"), c, noise=x), own) > 1e-3
    assert model_of("2rf").shift == 1.0


@pytest.mark.parametrize(("size", "tokens"), [(SIZE, 64), (2 * SIZE, 256)])
def test_the_shift_of_flux_is_that_of_its_pipeline(size, tokens):
    pipe = flux()
    call(pipe, num_inference_steps=4, height=size, width=size)
    model = ft.from_pipeline(pipe, image_size=size)
    linear = np.linspace(1, 0.25, 4)
    levels = [*(model.shift * linear / (1 + (model.shift - 1) * linear)), 0]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(levels, abs=1e-6)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    assert model.shift == pytest.approx(np.exp(mu))


def calls_of(model: ft.PromptModel) -> list[int]:
    """Rows of each call of the predictor, as they come."""
    rows: list[int] = []
    module: Any = model.predictor
    module.module.register_forward_pre_hook(
        lambda _, args, told: rows.append(len(told["hidden_states"])), with_kwargs=True
    )
    return rows


def test_guidance_is_each_models_own():
    halves = model_of("sd3")
    rows, c, x = calls_of(halves), told("sd3"), noise_of(halves)
    guided = ft.sample(halves, "E2", c, guidance=3.0, noise=x)
    assert rows == [4, 4]
    other = {name: value for name, value in told("sd3", 5).items() if "negative" in name}
    assert (
        relative_error(ft.sample(halves, "E2", {**c, **other}, guidance=3.0, noise=x), guided)
        > 1e-3
    )
    embedded = model_of("flux")
    rows, c = calls_of(embedded), told("flux")
    low, high = (ft.sample(embedded, "E2", c, guidance=g, noise=x) for g in (1.0, 4.0))
    assert rows == [2, 2, 2, 2]
    assert relative_error(low, high) > 1e-3
    none = model_of("flux", guidance_embeds=False)
    assert ft.sample(none, "E2", c, noise=x).isfinite().all()
    with pytest.raises(ValueError, match="guidance must be 1 for this model"):
        ft.sample(none, "E2", c, guidance=2.0, noise=x)


def test_batches_are_parts_of_the_whole():
    model, c = model_of("sd3"), told("sd3", count=5)
    whole = ft.sample(model, "H1P1", c, guidance=2.0, seed=4)
    assert_close(ft.sample(model, "H1P1", c, guidance=2.0, seed=4, batch_size=2), whole, 1e-5)
    alone = ft.sample(
        model,
        "H1P1",
        {k: v[3:4] for k, v in c.items()},
        guidance=2.0,
        noise=ft.noise(model.latent_shape, 4, [3]),
    )
    assert_close(alone, whole[3:4], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_captured_and_replayed_for_other_prompts(kind):
    model = model_of(kind, refined=True)
    asked = [(told(kind, seed), 1.5 + seed, seed) for seed in range(3)]
    expected = [ft.sample(model, "H1P1R1", c, guidance=g, seed=seed) for c, g, seed in asked]
    model.captures.recorder = Fake()
    for _ in range(2):
        for (c, g, seed), result in zip(asked, expected, strict=True):
            assert_close(ft.sample(model, "H1P1R1", c, guidance=g, seed=seed), result, 1e-5)
    assert (model.captures.recorder.recorded, model.captures.recorder.replayed >= 4) == (1, True)
    longer = {k: torch.cat([v, v], 1) if "pooled" not in k else v for k, v in asked[0][0].items()}
    ft.sample(model, "H1P1R1", longer, guidance=2.0)
    model.captures.clear()
    ft.compile(model, "H1P1R1", 2, prompts={k: v[:1] for k, v in longer.items()})
    assert model.captures.recorder.recorded == 2
    before = model.captures.recorder.replayed
    ft.sample(model, "H1P1R1", longer, guidance=2.0)
    assert model.captures.recorder.replayed == before + 1


# Refiners.


SD15 = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768, attention_head_dim=8,
)  # fmt: skip


def test_the_refiner_of_2_rf_has_the_papers_size():
    with torch.device("meta"):
        teacher = diffusers.UNet2DConditionModel(**SD15)
        made: Any = ft.refiner_for(teacher)
    assert sum(p.numel() for p in teacher.parameters()) == 859_520_964
    assert sum(p.numel() for p in made.parameters()) == 43_500_164
    assert (made.config.in_channels, made.config.out_channels, made.config.layers_per_block) == (
        8,
        4,
        1,
    )
    assert tuple(made.config.block_out_channels) == (160, 160, 320, 320)


@pytest.mark.parametrize("depth", [1, 2])
def test_refiners_of_published_transformers(depth):
    """Sizes of SD3-medium, SD3.5-medium, with its dual attention, and FLUX.1-dev."""
    with torch.device("meta"):
        sd = dict(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            in_channels=16,
            out_channels=16,
        )
        for teacher in (
            diffusers.SD3Transformer2DModel(**sd),
            diffusers.SD3Transformer2DModel(
                **sd, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
            ),
            diffusers.FluxTransformer2DModel(guidance_embeds=True),
        ):
            made: Any = ft.refiner_for(teacher, depth)
            assert made.config.in_channels == 2 * teacher.config.in_channels
            assert made.config.num_layers == depth
            assert made.proj_out.weight.shape == teacher.proj_out.weight.shape
            share = sum(p.numel() for p in made.parameters()) / sum(
                p.numel() for p in teacher.parameters()
            )
            assert share < 0.07 * depth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_new_refiner_passes_the_velocity_on_and_lives_in_a_folder(kind, depth, tmp_path):
    teacher = NETWORKS[kind]()
    made: Any = ft.refiner_for(teacher, depth)
    x, v, c = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), told(kind)
    more = {"embedded_guidance": torch.ones(2)} if kind == "flux" else {}
    with torch.no_grad():
        assert PromptNetwork(made)(x, torch.tensor([0.2, 0.9]), {**c, **more}, v).eq(0).all()
    made.save_pretrained(tmp_path)
    assert (
        ft.models.prompted.check_refiner(tmp_path, teacher).config.in_channels
        == 2 * teacher.config.in_channels
    )
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"refiner .* can't be read"):
        ft.models.prompted.check_refiner(tmp_path, teacher)


def test_refiners_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="depth must be 1 or 2, got 3"):
        ft.refiner_for(unet(), 3)
    with pytest.raises(TypeError, match="teacher must be one of UNet2DConditionModel, SD3"):
        ft.refiner_for(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must read 8 channels, x and v, got 4"):
        ft.from_pipeline(sd3(), sd3_transformer())
    with pytest.raises(
        TypeError, match="must be a SD3Transformer2DModel as the predictor is, got Flux"
    ):
        ft.from_pipeline(sd3(), ft.refiner_for(flux_transformer()))


# From pipelines, with text.


def loaded(pipeline_folders: dict[str, Path], kind: str, **options: Any) -> ft.PromptModel:
    convention: Any = "2-rf" if kind == "2rf" else "auto"
    return ft.from_pipeline(
        pipeline_folders[kind], convention=convention, image_size=SIZE, device="cpu", **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_encoded_as_the_pipeline_does(kind, pipeline_folders):
    model = loaded(pipeline_folders, kind)
    texts, against = ["a cat", "two dogs, one cat"], ["", "blurry"]
    found = model.encode(texts, against)
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
    assert found.keys() == set(names)
    for name, value in zip(names, expected, strict=True):
        assert_close(found[name], value, 1e-5)
    guidance = 2.0
    made = ft.sample(
        model,
        "H1P1",
        texts,
        guidance=guidance,
        seed=3,
        negative=None if kind == "flux" else against,
        output="uint8",
    )
    assert made.shape == (2, SIZE, SIZE, 3)
    assert made.equal(ft.sample(model, "H1P1", found, guidance=guidance, seed=3, output="uint8"))
    assert model.encode("a cat")["embeds"].shape == found["embeds"][:1].shape


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
    made = ft.inpaint(model, "H1P2", images, mask, ["a cat", "a dog"], guidance=1.5, seed=1)
    assert np.array_equal(made[:, :, SIZE // 2 :], images[:, :, SIZE // 2 :])
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
    model, c = model_of("sd3"), told("sd3")
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
