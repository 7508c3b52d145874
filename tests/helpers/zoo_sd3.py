"""Stable Diffusion 3, its ControlNets, and perturbed-attention guidance for SD3 and Sana."""

from __future__ import annotations

from typing import Any

import pipelines
import torch
from pipelines import diffusers, sd3_transformer
from zoo import Case, assembled, normal, picture, random_

_SIZE = dict(height=32, width=32, output_type="latent")


def prompts(length: int, width: int, pooled: int = 0, mask: bool = False) -> dict[str, Any]:
    """Encoded prompts of guided pipelines, positive and negative.

    pooled: the width of pooled prompts; 0: none. mask: whether attention masks come with them.
    """
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds"] = normal(1, length, width, seed=seed)
        if pooled:
            given[f"{prefix}pooled_prompt_embeds"] = normal(1, pooled, seed=2 + seed)
        if mask:
            given[f"{prefix}prompt_attention_mask"] = torch.ones(1, length, dtype=torch.long)
    return given


def _sd3(kind: str, parts: Any = None, channels: int = 4, **arguments: Any) -> Case:
    pipe = assembled(
        kind,
        transformer=sd3_transformer(in_channels=channels, out_channels=channels),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random_(pipelines.vae(channels), 0),
        **(parts or {}),
    )
    return Case(pipe, prompts(5, 32, pooled=16) | _SIZE | arguments)


def _controlnet(extra: int = 0) -> Any:
    controlnet = diffusers.SD3ControlNetModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        out_channels=4,
        extra_conditioning_channels=extra,
    )
    return random_(controlnet, 5)


def _inpainted(kind: str) -> Case:
    mask = picture(32, 2)
    mask.paste((0, 0, 0), (0, 0, 16, 32))
    return _sd3(kind, channels=16, image=picture(32, 1), mask_image=mask, strength=0.6)


def _sana_pag() -> Case:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    pipe = assembled(
        "SanaPAGPipeline",
        transformer=random_(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        pag_applied_layers="transformer_blocks.0",
    )
    arguments = dict(negative_prompt=None, use_resolution_binning=False, pag_scale=2.0)
    return Case(pipe, prompts(5, 8, mask=True) | _SIZE | arguments)


CASES = {
    "StableDiffusion3Pipeline": lambda: _sd3("StableDiffusion3Pipeline"),
    "StableDiffusion3Img2ImgPipeline": lambda: _sd3(
        "StableDiffusion3Img2ImgPipeline", image=picture(32, 1), strength=0.8
    ),
    "StableDiffusion3InpaintPipeline": lambda: _inpainted("StableDiffusion3InpaintPipeline"),
    "StableDiffusion3ControlNetPipeline": lambda: _sd3(
        "StableDiffusion3ControlNetPipeline",
        dict(controlnet=_controlnet()),
        control_image=picture(32, 3),
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": lambda: _sd3(
        "StableDiffusion3ControlNetInpaintingPipeline",
        dict(controlnet=_controlnet(1)),
        control_image=picture(32, 3),
        control_mask=picture(32, 4),
    ),
    "StableDiffusion3PAGPipeline": lambda: _sd3("StableDiffusion3PAGPipeline", pag_scale=2.0),
    "StableDiffusion3PAGImg2ImgPipeline": lambda: _sd3(
        "StableDiffusion3PAGImg2ImgPipeline", image=picture(32, 1), strength=0.6, pag_scale=2.0
    ),
    "SanaPAGPipeline": _sana_pag,
}
