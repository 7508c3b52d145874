"""Folders of autoencoders: published files load, and what is no whole VAE is refused by name."""

import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vae_folders import CPU, WEIGHTS, Canary, changed, images, make_folder, relative_error

from flowturbo.models.vae import VAE, DiffusersVAE, load_vae
from flowturbo.storage.files import CheckpointError


def test_a_pipelines_folder_is_that_of_its_vae(tmp_path: Path) -> None:
    make_folder(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert isinstance(load_vae(tmp_path, CPU, torch.float32), DiffusersVAE)


def test_published_files_with_the_old_names_of_attention_load(folder: Path, tmp_path: Path) -> None:
    """stabilityai/sd-vae-ft-ema is one."""
    old = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, before in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f"{new}.", f"{before}.")
        old[name] = value
    assert any("proj_attn" in name for name in old)
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    image = images(5, 1, 16, 16)
    new, renamed = (
        load_vae(place, CPU, torch.float32).encode(image)[0] for place in (folder, tmp_path)
    )
    assert torch.equal(new, renamed)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ("a key missing", CheckpointError, "lacks quant_conv.weight"),
        ("a key too many", CheckpointError, "has unexpected extra.weight"),
        ("a shape", CheckpointError, "can't be read"),
        ("another model's configuration", CheckpointError, "lacks"),
        ("broken configuration", CheckpointError, "JSON"),
        ("truncated", CheckpointError, "can't be read"),
        ("empty", CheckpointError, "can't be read"),
        ("no configuration", ValueError, "has no config.json"),
        ("no weights", ValueError, "has no diffusion_pytorch_model.safetensors"),
        ("means and deviations of latents", ValueError, "latents_mean"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_folders_that_are_no_whole_vae_are_refused(
    folder: Path, tmp_path: Path, change: str, error: type[ValueError], words: str
) -> None:
    place = changed(folder, tmp_path / "bad", change)
    with pytest.raises(error, match=words) as caught:
        load_vae(place, CPU, torch.float32)
    if change != "means and deviations of latents":
        assert str(place) in str(caught.value)


def test_pickled_weights_are_not_read_and_the_message_tells_how_to_convert_them(
    folder: Path, tmp_path: Path
) -> None:
    place = changed(folder, tmp_path / "pickled", "no weights")
    pickled, canary = place / "diffusion_pytorch_model.bin", tmp_path / "canary"
    pickled.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ValueError, match="a pickle, which is not read") as caught:
        load_vae(place, CPU, torch.float32)
    assert not canary.exists()

    torch.save(load_file(folder / WEIGHTS), pickled)
    command = str(caught.value).partition("convert it once: ")[2]
    from diffusers import AutoencoderKL

    eval(command, {"AutoencoderKL": AutoencoderKL})
    image = images(6, 1, 16, 16)
    converted, original = (
        load_vae(p, CPU, torch.float32).encode(image)[0] for p in (place, folder)
    )
    assert torch.equal(converted, original)


@pytest.mark.usefixtures("no_network")
def test_a_mistyped_path_is_not_taken_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file.safetensors").touch()
    names = [
        "./vae",
        "../vae",
        "/no/such/vae",
        "~/no-such-folder-here",
        "vae",
        "models/vae",
        "models",
        "file.safetensors",
        "",
    ]
    for name in [*names, Path("org/name"), tmp_path / "vae"]:
        began = time.perf_counter()
        with pytest.raises(ValueError, match="vae must be") as caught:
            load_vae(name, CPU, torch.float32)
        assert not isinstance(caught.value, CheckpointError)
        assert time.perf_counter() - began < 1


def test_a_name_without_a_network_fails_soon_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.hf_api.api, "endpoint", "http://127.0.0.1:9")  # where nobody answers
    began = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"'org/name' .* can't be had from the hub: .*\w"
    ) as caught:
        load_vae("org/name", CPU, torch.float32)
    assert time.perf_counter() - began < 12
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name, inside", [("org/name", "."), ("org/name/vae", "vae")])
def test_what_was_downloaded_before_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: str
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache/models--org--name", "0" * 40
    place = repository / "snapshots" / commit / inside
    place.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    image = images(7, 1, 16, 16)
    got, expected = (load_vae(n, CPU, torch.float32).encode(image)[0] for n in (name, folder))
    assert torch.equal(got, expected)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderTiny as save_pretrained writes it: 4 channels, an eighth of the side, as
    TAESD's.
    """
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        )
    place = tmp_path_factory.mktemp("taesd")
    network.save_pretrained(place)
    return place


def test_the_tiny_autoencoder_takes_scaled_latents(tiny: Path) -> None:
    from diffusers import AutoencoderTiny

    vae = load_vae(tiny, CPU, torch.float32)
    assert isinstance(vae, VAE)
    truth = AutoencoderTiny.from_pretrained(tiny, low_cpu_mem_usage=False).double()
    before = images(9, 2, 16, 24)
    mean, std = vae.encode(before)
    with torch.no_grad():
        latents = truth.encode(before.permute(0, 3, 1, 2).double() / 127.5 - 1).latents
        decoded = truth.decode(latents).sample
    assert (mean.shape, std) == ((2, 4, 2, 3), None)
    assert relative_error(mean, latents) < 1e-5
    levels = (127.5 * decoded + 128).clamp(0, 255).permute(0, 2, 3, 1)
    assert ((vae.decode(mean) - levels).abs() < 1.001).all()
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(images(10, 1, 12, 16))


def test_a_tiny_autoencoder_lacking_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    state = load_file(tiny / WEIGHTS)
    del state[name := max(state)]
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"no AutoencoderTiny .* lacks {name}"):
        load_vae(tmp_path, CPU, torch.float32)


def test_another_kind_of_model_is_named(folder: Path, tmp_path: Path) -> None:
    place = changed(folder, tmp_path / "other", "nothing")
    config = json.loads((place / "config.json").read_text()) | {"_class_name": "AutoencoderDC"}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match="of the kind AutoencoderDC, not one of AutoencoderKL, AutoencoderTiny",
    ):
        load_vae(place, CPU, torch.float32)
