"""EasyAnimate and Motif-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from zoo import Case, assembled, normal, picture, random_


def _easy_animate(kind: str, channels: int) -> Any:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=1, mmdit_layers=1, sample_width=4,
        sample_height=4, patch_size=2, resize_inpaint_mask_directly=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMagvit(
        block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        spatial_group_norm=False,
    )  # fmt: skip
    return assembled(
        kind,
        transformer=random_(transformer, 1),
        vae=random_(vae, 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _easy_arguments(**more: Any) -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return dict(
        prompt_embeds=normal(1, 5, 16),
        negative_prompt_embeds=normal(1, 5, 16, seed=1),
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        height=32,
        width=32,
        num_frames=5,
        output_type="latent",
        **more,
    )


def easy_animate() -> Case:
    return Case(_easy_animate("EasyAnimatePipeline", 4), _easy_arguments())


def easy_animate_control() -> Case:
    pipe = _easy_animate("EasyAnimateControlPipeline", 12)
    encode = pipe.encode_prompt
    # It is called with an argument that it does not take: as it is, the pipeline can't be called.
    pipe.encode_prompt = lambda text_encoder_index, **options: encode(**options)
    return Case(
        pipe, _easy_arguments(control_video=_video()), note="diffusers' own call fails, mended here"
    )


def easy_animate_inpaint() -> Case:
    # Latents, the mask's and the masked video's.
    pipe = _easy_animate("EasyAnimateInpaintPipeline", 12)
    mask = torch.zeros(1, 1, 5, 32, 32)
    mask[..., 16:] = 255
    return Case(pipe, _easy_arguments(video=_video(), mask_video=mask, strength=0.9))


def _video() -> torch.Tensor:
    return normal(1, 3, 5, 32, 32).sigmoid()


def _motif(kind: str) -> Any:
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=12,
        num_layers=1, num_single_layers=1, patch_size=1, text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    return assembled(
        kind,
        transformer=random_(transformer, 1),
        vae=random_(vae, 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.AdaptiveProjectedGuidance(),
    )


def _motif_arguments(**more: Any) -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return dict(
        prompt_embeds=normal(1, 5, 32),
        prompt_attention_mask=mask,
        negative_prompt_embeds=normal(1, 5, 32, seed=1),
        negative_prompt_attention_mask=mask,
        height=16,
        width=16,
        num_frames=5,
        output_type="latent",
        **more,
    )


def motif() -> Case:
    return Case(_motif("MotifVideoPipeline"), _motif_arguments())


def motif_from_image() -> Case:
    pipe = _motif("MotifVideoImage2VideoPipeline")
    return Case(pipe, _motif_arguments(prompt=None, image=picture(16)))


CASES = {
    "EasyAnimatePipeline": easy_animate,
    "EasyAnimateControlPipeline": easy_animate_control,
    "EasyAnimateInpaintPipeline": easy_animate_inpaint,
    "MotifVideoPipeline": motif,
    "MotifVideoImage2VideoPipeline": motif_from_image,
}
