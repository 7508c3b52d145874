"""Small files under the names of published ones, in the same formats, so that the documents'
commands run as they are written.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import class_runs_small
import complete
import complete_newer
import numpy as np
import pipelines
import torch
from class_runs_small import COUNTS, HELD, THREE
from feature_network import RandomNetwork
from paths import ROOT
from PIL import Image
from tiny import CONFIG, random_sit
from torch import nn

import flowturbo as ft
from flowturbo.models.checkpoint import save_sit

CLASSES = 1000  # ImageNet's, for the labels in the examples
SIDE = 16  # of the SiT's images; latents have half of it, and the pipelines' images 32


NEWER = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22"}
"""Pipelines that only some documents name."""


def write(folder: Path, pipeline_folders: dict[str, Path], text: str = "") -> None:
    """Write all files that the documents name but do not make.

    text: of the document, for those that are made only where they are named.
    """
    for name, kind in NEWER.items():
        if name in text:
            complete_newer.complete(kind).save_pretrained(folder / name)
    config = replace(
        CONFIG,
        hidden=384,
        heads=6,
        depth=1,
        side=SIDE // 2,
        num_classes=CLASSES,
        learned_sigma=True,
    )
    # As published: the predictor as a bare state dict, with a learned sigma that is not used; the
    # refiner under "ema".
    torch.save(random_sit(config, 0).state_dict(), folder / "SiT-XL-2-256x256.pt")
    refiner = random_sit(config.refiner(), 1).state_dict()
    torch.save({"model": refiner, "ema": refiner}, folder / "SiT-XL-2-Refiner.pt")
    names = [f"class {k}" for k in range(CLASSES)]
    names[207] = "golden retriever"
    (folder / "imagenet-names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    pipelines.vae().save_pretrained(folder / "stabilityai" / "sd-vae-ft-ema")
    for kind, name in {
        "sd3": "stabilityai/stable-diffusion-3.5-medium",
        "flux": "black-forest-labs/FLUX.1-dev",
        "2rf": "XCLiu/2_rectified_flow_from_sd_1_5",
    }.items():
        shutil.copytree(pipeline_folders[kind], folder / name)
    _third_text_encoder(folder / "stabilityai/stable-diffusion-3.5-medium")
    _refiner(folder / "runs" / "2rf-refiner", pipelines.unet())
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", **reference())
    for place in (
        "imagenet/train/n01440764",
        "imagenet/train/n01443537",
        "captioned",
        "coco-reference",
    ):
        (folder / place).mkdir(parents=True)
        for i in range(3):
            _picture(folder / place / f"{i}.png", seed=i)
    for i in range(3):
        (folder / "captioned" / f"{i}.txt").write_text(f"noise {i}", encoding="utf-8")
    ft.Plan("LL", (0, 0.5, 1), weights=((0.5,), (0.8, -0.3))).save(folder / "tuned.json")
    if "emoji.safetensors" in text:
        save_sit(folder / "emoji.safetensors", random_sit(THREE, 0))
        class_runs_small.write(folder / "train.npz", class_runs_small.drawn(0, COUNTS))
        class_runs_small.write(folder / "held-out.npz", class_runs_small.drawn(1, HELD))
    (folder / "captions.txt").write_text("a red fox\na harbour\na red house\n", encoding="utf-8")
    _picture(folder / "photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[SIDE // 2 :] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    for name in ("bench", "tests", "pyproject.toml"):  # some commands are run in a checkout
        (folder / name).symlink_to(ROOT / name)


def _third_text_encoder(folder: Path) -> None:
    """Add T5 as the third text encoder, as in the published SD3: the small pipeline has none."""
    pipe = complete.complete_sd3()
    tokenizer, encoder = complete._t5(9)
    pipe.register_modules(tokenizer_3=tokenizer, text_encoder_3=encoder)
    pipe.save_pretrained(folder)


def _refiner(folder: Path, teacher: nn.Module) -> None:
    ft.refiner_for(teacher).save_pretrained(folder)  # type: ignore[operator]


def _picture(path: Path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def reference() -> dict[str, np.ndarray]:
    """In ADM's layout: images, and means and covariances over more images than those."""
    whole = np.random.default_rng(5).integers(0, 256, (64, SIDE, SIDE, 3), dtype=np.uint8)
    pool, spatial = (x.double().numpy() for x in RandomNetwork().read(whole))
    gaussians = {"mu": pool.mean(0), "sigma": np.cov(pool, rowvar=False)}
    return {
        "arr_0": whole[:20],
        **gaussians,
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }
