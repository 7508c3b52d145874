"""Small text-to-image models of each kind, and their conditioning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipelines
import torch
from pipelines import (
    SIZE,
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


def conditioning(kind: str, seed: int = 0, count: int = 2) -> dict[str, Tensor]:
    """Encoded prompts as our models take them."""
    values = embeds(seed, count) | negative(seed + 9, count)
    named = {
        name.replace("prompt_embeds", "embeds").replace("pooled_embeds", "pooled"): value
        for name, value in values.items()
    }
    return {name: value for name, value in named.items() if kind != "2rf" or "pooled" not in name}


def noise_of(model: ft.PromptModel, count: int = 2, seed: int = 1) -> Tensor:
    return ft.noise(model.latent_shape, seed, range(count))


def loaded(pipeline_folders: dict[str, Path], kind: str, **options: Any) -> ft.PromptModel:
    convention: Any = "2-rf" if kind == "2rf" else "auto"
    return ft.from_pipeline(
        pipeline_folders[kind], convention=convention, image_size=SIZE, device="cpu", **options
    )
