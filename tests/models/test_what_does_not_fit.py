"""Weights that are not finite, and autoencoders and refiners that do not fit, are found at load."""

import json
import math
import shutil

import pytest
import torch
from close import assert_close
from published_checkpoints import HEADS, predictor_state, refiner_state, sit
from safetensors.torch import load_file, save_file
from vae_folders import WEIGHTS, make_folder

import flowturbo as ft
from flowturbo.models.checkpoint import convert, save_sit
from flowturbo.models.finite_weights import check_finite
from flowturbo.models.vae import DiffusersVAE, Pixels
from flowturbo.storage.files import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*label table")

BAD = [math.nan, math.inf, -math.inf]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_one_bad_number_anywhere_is_found(dtype, bad, size):
    generator = torch.Generator().manual_seed(size)
    for at in {0, size // 2, size - 1, *torch.randint(size, (4,), generator=generator).tolist()}:
        good = torch.randn(size, generator=generator).to(dtype)
        check_finite("it", {"a": good, "n": torch.arange(3), "empty": torch.empty(0)})
        wrong = good.clone()
        wrong[at] = bad
        if bool(wrong.float().isfinite().all()):  # this type has no infinity
            continue
        with pytest.raises(CheckpointError, match=rf"NaN or infinite: b \(1 of {size}\)"):
            check_finite("it", {"a": good, "b": wrong, "b.strided": torch.stack([good, good], 1)})


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("role", ["predictor", "refiner"])
def test_a_file_with_them_is_refused(tmp_path, bad, role):
    states = {"predictor": predictor_state(61, depth=1), "refiner": refiner_state(62)}
    for name in ("blocks.0.mlp.fc2.weight", "pos_embed"):
        state = {key: value.clone() for key, value in states[role].items()}
        state[name].view(-1)[3:5] = bad
        torch.save(states | {role: state}, tmp_path / "all.pt")
        for part, weights in (states | {role: state}).items():
            torch.save({"ema": weights}, tmp_path / f"{part}.pt")
        message = rf"{role}\.pt has weights that are NaN or infinite: {name} \(2 of"
        files = tmp_path / "predictor.pt", tmp_path / "refiner.pt"
        with pytest.raises(CheckpointError, match=message):
            ft.load(*files, heads=HEADS, device="cpu")
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / f"{role}.pt", tmp_path / "c.safetensors", role=role, heads=HEADS)
    assert not (tmp_path / "c.safetensors").exists()


def test_networks_and_files_of_ours_with_them(tmp_path):
    network = sit()
    with torch.no_grad():
        network.blocks[0].attn.proj.bias[1] = math.nan
    with pytest.raises(CheckpointError, match=r"predictor.*blocks\.0\.attn\.proj\.bias \(1 of 32"):
        ft.load(network, device="cpu")
    save_sit(tmp_path / "a.safetensors", network)
    with pytest.raises(CheckpointError, match=r"a\.safetensors has weights that are NaN.*earlier"):
        ft.load(tmp_path / "a.safetensors", device="cpu")


def test_many_are_counted(tmp_path):
    state = {name: torch.full_like(value, math.nan) for name, value in predictor_state().items()}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"and \d+ more") as refusal:
        ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu")
    assert len(str(refusal.value)) < 800


def test_weights_too_large_for_the_dtype_are_named(tmp_path):
    """Finite in the file, infinite where they are computed with."""
    state = predictor_state(63, depth=1)
    state["blocks.0.mlp.fc2.weight"][0, 0] = 7e4
    torch.save(state, tmp_path / "a.pt")
    ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu")
    message = r"cast to torch.float16.*fc2\.weight \(1 of .*bfloat16"
    with pytest.raises(CheckpointError, match=message):
        ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu", dtype=torch.float16)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", heads=HEADS, dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_vae_with_them_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "vae")
    state = load_file(tmp_path / "vae" / WEIGHTS)
    state["decoder.conv_in.weight"].view(-1)[0] = math.nan
    save_file(state, tmp_path / "vae" / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vae .*NaN or infinite: decoder\.conv_in\.weight"):
        ft.load(sit(), vae=tmp_path / "vae", device="cpu")


def test_a_vae_of_other_latents_is_refused_at_load(tmp_path, folder):
    assert ft.load(sit(), vae=folder, device="cpu").vae is not None
    assert ft.load(sit(channels=1), vae="pixels", device="cpu").vae is not None
    for vae, own in ((folder, 4), (str(folder), 4)):
        with pytest.raises(ValueError, match=f"vae does not fit.*{own} channels, the model's 16"):
            ft.load(sit(channels=16), vae=vae, device="cpu")
    for vae in ("pixels", Pixels()):
        with pytest.raises(ValueError, match=r"vae does not fit .* 1 channels, the model's 4"):
            ft.load(sit(), vae=vae, device="cpu")
    save_sit(tmp_path / "a.safetensors", sit(), vae="pixels")
    with pytest.raises(ValueError, match=r"vae does not fit .* 1 channels, the model's 4"):
        ft.load(tmp_path / "a.safetensors", device="cpu")
    model = ft.load(tmp_path / "a.safetensors", vae=folder, device="cpu")
    assert model.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 16, 16, 3)


def test_conversion_names_no_vae_that_does_not_fit(tmp_path, folder):
    torch.save(predictor_state(64, depth=1), tmp_path / "a.pt")
    target = tmp_path / "b.safetensors"
    wide = make_folder(tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(wide, tmp_path / "pipeline" / "vae")
    for vae, channels in (("pixels", 1), (str(wide), 16), (str(tmp_path / "pipeline"), 16)):
        with pytest.raises(ValueError, match=f"does not fit .* {channels} channels, the model's 4"):
            convert(tmp_path / "a.pt", target, heads=HEADS, vae=vae)
        assert not target.exists()
    for vae in (str(folder), "stabilityai/sd-vae-ft-ema"):
        convert(tmp_path / "a.pt", target, heads=HEADS, vae=vae)


class Decoder:
    """An object of the user's own; channels are its own affair."""

    factor = 8

    def decode(self, latents):
        return torch.zeros(len(latents), 8, 8, 3, dtype=torch.uint8)

    def encode(self, images):
        return torch.zeros(len(images), 4, 8, 8), None


def test_objects_that_are_no_autoencoders_are_refused(folder):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with pytest.raises(TypeError, match=r"vae must have factor.*AutoencoderKL.*DiffusersVAE of it"):
        ft.load(sit(), vae=network, device="cpu")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wrapped = ft.load(sit(), vae=DiffusersVAE(network), device="cpu").decode(latents)
    assert_close(wrapped, ft.load(sit(), vae=folder, device="cpu").decode(latents), 0.02)
    assert ft.load(sit(), vae=Decoder(), device="cpu").decode(latents).shape == (1, 8, 8, 3)
    for vae in (3, object(), torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="vae must be a folder, a hub name, 'pixels', 'rgb' or"):
            ft.load(sit(), vae=vae, device="cpu")


def test_pipelines_are_checked_alike(folder, tmp_path):
    pytest.importorskip("diffusers")
    from pipelines import sd3

    pipe = sd3()
    with pytest.raises(ValueError, match=r"vae does not fit .* 1 channels"):
        ft.from_pipeline(pipe, vae="pixels")


def test_refiners_of_pipelines_must_read_the_same_prompts():
    pytest.importorskip("diffusers")
    from pipelines import flux_transformer, sd3_transformer

    teacher = sd3_transformer()
    good = ft.refiner_for(teacher)
    from flowturbo.models.refiners import check_refiner

    assert check_refiner(good, teacher) is good
    for name in ("joint_attention_dim", "pooled_projection_dim", "patch_size", "out_channels"):
        config = {**good.config, name: 2 * good.config[name]}
        other = type(good).from_config(config)
        what = "number of output channels" if name == "out_channels" else name
        with pytest.raises(ValueError, match=f"refiner does not fit the predictor: its {what} is"):
            check_refiner(other, teacher)
    flux = flux_transformer()
    guided = type(flux).from_config(
        {**ft.refiner_for(flux).config, "guidance_embeds": not flux.config.guidance_embeds}
    )
    with pytest.raises(ValueError, match="its guidance_embeds is"):
        check_refiner(guided, flux)


def test_pipelines_by_name_are_checked_for_weights_that_are_not_finite(pipeline_folders, tmp_path):
    shutil.copytree(pipeline_folders["sd3"], tmp_path / "sd3")
    file = tmp_path / "sd3" / "transformer" / WEIGHTS
    state = load_file(file)
    name = "transformer_blocks.0.attn.to_q.weight"
    state[name].view(-1)[1] = 7e4
    save_file(state, file, {"format": "pt"})
    ft.from_pipeline(tmp_path / "sd3", image_size=32, device="cpu", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=rf"sd3', cast to torch\.float16,.*{name}"):
        ft.from_pipeline(tmp_path / "sd3", image_size=32, device="cpu", dtype=torch.float16)
    state[name].view(-1)[1] = math.nan
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"SD3Transformer2DModel of .*sd3' has .*{name} \(1"):
        ft.from_pipeline(tmp_path / "sd3", image_size=32, device="cpu")
