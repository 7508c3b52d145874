"""Tiny random pipelines of Qwen-Image, Z-Image, FLUX.2 and Wan, of diffusers' real classes and
without text encoders, and what they are called with.
"""

from __future__ import annotations

from typing import Any

import torch
from pipelines import SIZE, diffusers, randomised, vae
from torch import Tensor

import flowturbo as ft

KINDS = ("qwen", "zimage", "flux2", "klein", "wan", "wan22")
WIDTH = 32


def transformer(kind: str, seed: int = 3, **config: Any) -> Any:
    name, sizes = {
        "qwen": (
            "QwenImageTransformer2DModel",
            dict(
                patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
            ),
        ),
        "zimage": (
            "ZImageTransformer2DModel",
            dict(
                in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
            ),
        ),
        "flux2": (
            "Flux2Transformer2DModel",
            dict(
                in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4, 4),
                timestep_guidance_channels=32, guidance_embeds=kind == "flux2",
            ),
        ),
        "wan": (
            "WanTransformer3DModel",
            dict(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2,
            ),
        ),
    }[{"klein": "flux2", "wan22": "wan"}.get(kind, kind)]  # fmt: skip
    return randomised(getattr(diffusers, name)(**sizes | config), seed)


def _codec(kind: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "qwen":
            network = diffusers.AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0],
            )  # fmt: skip
        elif kind.startswith("wan"):
            network = diffusers.AutoencoderKLWan(
                base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
                latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0],
                scale_factor_temporal=2, scale_factor_spatial=2,
            )  # fmt: skip
        elif kind in ("flux2", "klein"):
            network = diffusers.AutoencoderKLFlux2(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                latent_channels=4,
            )  # fmt: skip
            network.bn.running_mean.normal_()
            network.bn.running_var.uniform_(0.5, 2)
        else:
            return vae()
    return network.requires_grad_(False).eval()


def newer(kind: str, network: Any = None, name: str | None = None, **options: Any) -> Any:
    """A pipeline. name: of another class for the same components."""
    wan = kind.startswith("wan")
    if kind == "wan22":
        options = {"transformer_2": transformer(kind, 8), "boundary_ratio": 0.6, **options}
    scheduler = (
        dict(shift=3.0)
        if wan or kind == "zimage"
        else dict(use_dynamic_shifting=True, max_shift=0.9)
    )
    own = {
        "qwen": "QwenImagePipeline",
        "zimage": "ZImagePipeline",
        "flux2": "Flux2Pipeline",
        "klein": "Flux2KleinPipeline",
    }
    pipe = getattr(diffusers, name or own.get(kind, "WanPipeline"))(
        transformer=network if network is not None else transformer(kind),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=_codec(kind),
        text_encoder=None,
        tokenizer=None,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


LENGTHS = {"": (5, 3), "negative_": (4, 4)}
"""Tokens of the two prompts, and of the negative ones, where a pipeline takes any."""


def prompts(kind: str, seed: int = 0) -> dict[str, list[Tensor]]:
    """Encoded prompts, (L, D) each, and the negative ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: [
            torch.randn(n if kind in ("qwen", "zimage") else 5, WIDTH, generator=generator)
            for n in lengths
        ]
        for prefix, lengths in LENGTHS.items()
    }


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def conditions(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Encoded prompts as our models take them."""
    encoded: dict[str, Tensor] = {}
    for prefix, rows in prompts(kind, seed).items():
        encoded[f"{prefix}embeds"] = padded(rows)
        if kind in ("qwen", "zimage"):
            encoded[f"{prefix}lengths"] = torch.tensor([len(row) for row in rows])
    return encoded


FRAMES = 5


def noise_for(pipe: Any, model: ft.PromptModel, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *model.latent_shape, generator=generator)


def call(kind: str, pipe: Any, guidance: float, noise: Tensor, **options: Any) -> Tensor:
    """What the stock pipeline makes of latents as ours, at ours' guidance scale."""
    rows, more, start = prompts(kind), {}, noise
    embeds: dict[str, Any] = {
        f"{prefix}prompt_embeds": padded(part) for prefix, part in rows.items()
    }
    if kind == "qwen":
        for prefix, part in rows.items():
            lengths = torch.tensor([len(row) for row in part])
            embeds[f"{prefix}prompt_embeds_mask"] = torch.arange(max(lengths)) < lengths[:, None]
        start = pipe._pack_latents(noise[:, None], *noise.shape)
        more = {"true_cfg_scale": guidance}
    elif kind == "zimage":
        embeds = {f"{prefix}prompt_embeds": part for prefix, part in rows.items()}
        more = {"guidance_scale": guidance - 1}
    elif kind in ("flux2", "klein"):
        more = {"guidance_scale": guidance}
        if kind == "flux2":
            del embeds["negative_prompt_embeds"]
    else:
        more = {"guidance_scale": guidance, "num_frames": FRAMES}
    if guidance == 1 and kind == "qwen":
        embeds = {name: value for name, value in embeds.items() if "negative" not in name}
    result = pipe(
        **embeds, **more, latents=start, height=SIZE, width=SIZE,
        **{"output_type": "latent", **options},
    )  # fmt: skip
    return result.frames if kind.startswith("wan") else result.images


def as_ours(kind: str, pipe: Any, latents: Tensor) -> Tensor:
    """The stock pipeline's latents in the form of ours."""
    if kind == "qwen":
        return pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)[:, :, 0]
    if kind == "flux2":
        side = SIZE // 4
        return latents.transpose(1, 2).unflatten(2, (side, side))
    if kind == "klein":  # returned as its VAE reads them
        patches = pipe._patchify_latents(latents)
        mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
        std = (pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).sqrt()
        return (patches - mean) / std
    return latents
