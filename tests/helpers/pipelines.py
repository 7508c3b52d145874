"""Tiny random pipelines of diffusers' real classes, without text encoders, and what they are called
with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

SIZE = 32  # pixels; latents are half


def vae(channels: int = 4, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=channels,
            shift_factor=0.0609,
            scaling_factor=1.5305,
        ).eval()


def randomised(module: Any, seed: int) -> Any:
    """No weight is zero, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.05 if parameter.ndim == 1 else 0.7 / parameter[0].numel() ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False).eval()


def sd3_transformer(seed: int = 1, **config: Any) -> Any:
    return randomised(
        diffusers.SD3Transformer2DModel(
            **dict(
                sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
                pooled_projection_dim=16,
                pos_embed_max_size=16,
            )
            | config
        ),
        seed,
    )  # fmt: skip


def flux_transformer(seed: int = 2, **config: Any) -> Any:
    return randomised(
        diffusers.FluxTransformer2DModel(
            **dict(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            )
            | config
        ),
        seed,
    )  # fmt: skip


def unet(seed: int = 3, **config: Any) -> Any:
    return randomised(
        diffusers.UNet2DConditionModel(
            **dict(
                sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
            )
            | config
        ),
        seed,
    )  # fmt: skip


def _no_text(count: int) -> dict[str, None]:
    """Of a pipeline with so many text encoders, all of them left out."""
    return {
        f"{kind}{suffix}": None
        for kind in ("text_encoder", "tokenizer")
        for suffix in ("", "_2", "_3")[:count]
    }


def sd3(kind: str = "StableDiffusion3Pipeline", transformer: Any = None, **scheduler: Any) -> Any:
    pipe = getattr(diffusers, kind)(
        transformer=transformer or sd3_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(),
        **_no_text(3),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(kind: str = "FluxPipeline", transformer: Any = None, **scheduler: Any) -> Any:
    pipe = getattr(diffusers, kind)(
        transformer=transformer or flux_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
        ),
        vae=vae(),
        **_no_text(2),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(seed: int = 0, count: int = 2, pooled: bool = True) -> dict[str, torch.Tensor]:
    """Encoded prompts, as a pipeline takes them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"prompt_embeds": torch.randn(count, 5, 32, generator=generator)}
    if pooled:
        tensors["pooled_prompt_embeds"] = torch.randn(count, 16, generator=generator)
    return tensors


def negative(seed: int = 9, count: int = 2) -> dict[str, torch.Tensor]:
    return {f"negative_{name}": value for name, value in embeds(seed, count).items()}


def call(pipe: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    """Latents of two images, from a seed."""
    prompts = embeds()
    if "StableDiffusion3" in type(pipe).__name__ and options.get("guidance_scale", 7.0) > 1:
        prompts |= negative()
    sized = {} if "image" in options else dict(height=SIZE, width=SIZE)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    return pipe(
        **prompts, **{"generator": generators, "output_type": "latent", **sized, **options}
    ).images
