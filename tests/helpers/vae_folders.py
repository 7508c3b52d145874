"""Folders of small autoencoders, and images for them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(seed: int, count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        256,
        (count, height, width, 3),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def make_folder(path: Path, **config: object) -> Path:
    """A tiny random AutoencoderKL as save_pretrained writes it: 4 channels, half the side."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
            **config,
        )
    network.save_pretrained(path)
    return path


def changed(folder: Path, target: Path, change: str) -> Path:
    """A copy of a VAE's folder with one thing wrong in it."""
    state, config = (
        load_file(folder / WEIGHTS),
        (folder / "config.json").read_text(encoding="utf-8"),
    )
    if change == "a key missing":
        del state["quant_conv.weight"]
    if change == "a key too many":
        state["extra.weight"] = torch.zeros(2)
    if change == "a shape":
        state["quant_conv.weight"] = torch.zeros(3, 3, 1, 1)
    if change == "another model's configuration":
        config = json.dumps(json.loads(config) | {"layers_per_block": 2})
    if change == "broken configuration":
        config = config[:-9]
    if change == "means and deviations of latents":
        config = json.dumps(
            json.loads(config) | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        )
    target.mkdir()
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    if change != "no configuration":
        (target / "config.json").write_text(config, encoding="utf-8")
    if change == "truncated":
        (target / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes()[:-100])
    if change == "empty":
        (target / WEIGHTS).write_bytes(b"")
    if change == "no weights":
        (target / WEIGHTS).unlink()
    return target


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))
