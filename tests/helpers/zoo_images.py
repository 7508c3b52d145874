"""ERNIE-Image, HunyuanImage, Nucleus-Image, OmniGen, Ovis-Image and PRX."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pipelines
import torch
from stand_in_text import Letters, Reader
from zoo import Case, assembled, flux2_vae, normal, random_


def _scheduler(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def ernie() -> Case:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16,
        out_channels=16, text_in_dim=32, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipe = assembled(
        "ErnieImagePipeline",
        transformer=random_(transformer, 1),
        vae=random_(flux2_vae(8, 8), 2),
        scheduler=_scheduler(shift=3.0),
    )
    return Case(
        pipe,
        dict(
            prompt_embeds=[normal(5, 32)],
            negative_prompt_embeds=[normal(3, 32, seed=1)],
            height=16,
            width=16,
            output_type="latent",
        ),
    )


def _hunyuan_transformer(channels: int, **more: Any) -> Any:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, **more,
    )  # fmt: skip
    return random_(transformer, 1)


def hunyuan(**transformer: Any) -> Case:
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32),
        layers_per_block=1, scaling_factor=0.476986, spatial_compression_ratio=8, sample_size=128,
    )  # fmt: skip
    guider = diffusers.AdaptiveProjectedMixGuidance
    pipe = assembled(
        "HunyuanImagePipeline",
        scheduler=_scheduler(shift=5.0),
        vae=random_(vae, 2),
        transformer=_hunyuan_transformer(
            4, text_embed_2_dim=16, rope_axes_dim=(4, 4), **transformer
        ),
        guider=guider(adaptive_projected_guidance_start_step=5),
        ocr_guider=guider(adaptive_projected_guidance_start_step=2),
    )
    texts = {
        f"{sign}prompt_embeds{number}": normal(1, 5, width, seed=seed)
        for sign, seed in (("", 0), ("negative_", 1))
        for number, width in (("", 32), ("_2", 16))
    }
    masks = {name.replace("embeds", "embeds_mask"): torch.ones(1, 5) for name in texts}
    return Case(pipe, dict(**texts, **masks, height=32, width=32, output_type="latent"))


def hunyuan_refiner() -> Case:
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=8, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=1,
    )  # fmt: skip
    pipe = assembled(
        "HunyuanImageRefinerPipeline",
        scheduler=_scheduler(shift=4.0),
        vae=random_(vae, 2),
        transformer=_hunyuan_transformer(
            8, patch_size=(1, 1, 1), rope_axes_dim=(2, 2, 4), guidance_embeds=True
        ),
    )
    return Case(
        pipe,
        dict(
            image=normal(1, 4, 1, 4, 4),
            prompt_embeds=normal(1, 5, 32),
            prompt_embeds_mask=torch.ones(1, 5),
            height=4 * pipe.vae_scale_factor,
            width=4 * pipe.vae_scale_factor,
            output_type="latent",
        ),
    )


def nucleus() -> Case:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, joint_attention_dim=16, mlp_ratio=6.0,
        axes_dims_rope=(8, 4, 4), num_experts=4, moe_intermediate_dim=16,
        capacity_factors=[2.0] * 2, dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = assembled(
        "NucleusMoEImagePipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=random_(vae, 2),
    )
    mask = torch.ones(1, 5, dtype=torch.long)
    return Case(
        pipe,
        dict(
            prompt_embeds=normal(1, 5, 16),
            prompt_embeds_mask=mask,
            negative_prompt_embeds=normal(1, 5, 16, seed=1),
            negative_prompt_embeds_mask=mask,
            height=32,
            width=32,
            output_type="latent",
        ),
    )


def omnigen() -> Case:
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

    if not hasattr(processor_omnigen, "transforms"):  # without torchvision
        processor_omnigen.transforms = _TRANSFORMS
        pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        num_layers=1, time_step_dim=8, vocab_size=128, pad_token_id=0,
        rope_scaling={"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 2.0, 3.0, 4.0]},
    )  # fmt: skip
    # Its processor takes it for granted that the VAE reduces by 8.
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    pipe = assembled(
        "OmniGenPipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=random_(vae, 2),
        tokenizer=Letters(),
    )
    return Case(
        pipe,
        dict(prompt="a cat", height=32, width=32, output_type="latent"),
        note="inverted sigmas",
    )


_TRANSFORMS = SimpleNamespace(
    Compose=lambda steps: steps,
    Lambda=lambda step: step,
    ToTensor=lambda: None,
    Normalize=lambda **unused: None,
)
"""What OmniGen takes of torchvision. It is not called where no image is given."""


def ovis() -> Case:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = assembled(
        "OvisImagePipeline",
        scheduler=_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=pipelines.vae(),
        transformer=random_(transformer, 1),
    )
    return Case(
        pipe,
        dict(
            prompt_embeds=normal(1, 5, 32),
            negative_prompt=None,
            negative_prompt_embeds=normal(1, 5, 32, seed=1),
            height=32,
            width=32,
            output_type="latent",
        ),
    )


def _prx_arguments() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.bool)
    return dict(
        prompt_embeds=normal(1, 5, 8),
        negative_prompt_embeds=normal(1, 5, 8, seed=1),
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="latent",
    )


def prx() -> Case:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2,
        depth=1, axes_dim=[4, 4],
    )  # fmt: skip
    pipe = assembled(
        "PRXPipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(shift=3.0),
        text_encoder=Reader(8),
        tokenizer=Letters(),
        vae=pipelines.vae(),
    )
    return Case(pipe, _prx_arguments())


def prx_pixel() -> Case:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3, patch_size=8, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2,
        depth=1, axes_dim=[4, 4], bottleneck_size=8, resolution_embeds=True,
    )  # fmt: skip
    pipe = assembled(
        "PRXPixelPipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(shift=3.0),
        text_encoder=Reader(8),
        tokenizer=Letters(),
    )
    return Case(pipe, _prx_arguments(), note="predicts data, and divides by at least 0.05")


CASES = {
    "ErnieImagePipeline": ernie,
    "HunyuanImagePipeline": hunyuan,
    "HunyuanImagePipeline: distilled": lambda: hunyuan(use_meanflow=True, guidance_embeds=True),
    "HunyuanImageRefinerPipeline": hunyuan_refiner,
    "NucleusMoEImagePipeline": nucleus,
    "OmniGenPipeline": omnigen,
    "OvisImagePipeline": ovis,
    "PRXPipeline": prx,
    "PRXPixelPipeline": prx_pixel,
}
