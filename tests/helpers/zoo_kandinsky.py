"""Kandinsky 5 and 6."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from zoo import Case, assembled, normal, picture, random_


def _five(kind: str, vae: Any, visual_cond: bool) -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(4, 6, 6), visual_cond=visual_cond, attention_type="regular",
    )  # fmt: skip
    return assembled(
        kind,
        transformer=random_(transformer, 1),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def _video_vae() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False, down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    )  # fmt: skip
    return random_(vae, 2)


def _arguments(**more: Any) -> dict[str, Any]:
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    return dict(
        prompt_embeds_qwen=normal(1, 5, 32),
        prompt_embeds_clip=normal(1, 16),
        prompt_cu_seqlens=lengths,
        negative_prompt_embeds_qwen=normal(1, 5, 32, seed=1),
        negative_prompt_embeds_clip=normal(1, 16, seed=1),
        negative_prompt_cu_seqlens=lengths,
        height=32,
        width=32,
        output_type="latent",
        **more,
    )


def text_to_video() -> Case:
    # As published, with channels for a condition, which text to video leaves at zero.
    return Case(_five("Kandinsky5T2VPipeline", _video_vae(), True), _arguments(num_frames=5))


def image_to_video() -> Case:
    pipe = _five("Kandinsky5I2VPipeline", _video_vae(), True)
    # The first four latent frames get the mean and standard deviation of those that follow.
    return Case(pipe, _arguments(num_frames=21, image=picture(32)))


def _image(kind: str, visual_cond: bool, **more: Any) -> Case:
    # Four blocks, since the pipelines take it for granted that the VAE reduces by 8.
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    pipe = _five(kind, random_(vae, 2), visual_cond)
    pipe.resolutions = [(32, 32)]  # of the published ones the smallest has 640 x 1408 pixels
    return Case(pipe, _arguments(**more))


def text_to_image() -> Case:
    return _image("Kandinsky5T2IPipeline", False)


def image_to_image() -> Case:
    return _image("Kandinsky5I2IPipeline", True, image=picture(32))


def _six() -> Any:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16,
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
        in_audio_dim=6, out_audio_dim=6, visual_token_type_num_embeddings=2,
    )  # fmt: skip
    return assembled(
        "Kandinsky6TI2VAPipeline",
        transformer=random_(transformer, 1),
        vae=_video_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=diffusers.MMAudioVAE(
            mel_bins=8, latent_channels=6, hidden_channels=8, layers_per_block=1, n_fft=64
        ),
        vocoder=diffusers.MMAudioVocoder(
            num_mels=8, upsample_initial_channel=16, upsample_rates=(2,),
            upsample_kernel_sizes=(4,), resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),),
        ),
    )  # fmt: skip


def text_to_video_and_audio() -> Case:
    return Case(
        _six(),
        dict(
            prompt_embeds=normal(1, 5, 32),
            pooled_prompt_embeds=normal(1, 16),
            negative_prompt_embeds=normal(1, 5, 32, seed=1),
            negative_pooled_prompt_embeds=normal(1, 16, seed=1),
            image=picture(32),
            height=32,
            width=32,
            num_frames=5,
            output_type="latent",
        ),
        note="video and sound, each with a scheduler of its own",
    )


def super_resolution(scheduler: Any = None, predictions: int = 1) -> Case:
    transformer = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=4 * predictions, time_dim=16, model_dim=16, ff_dim=32,
        num_visual_blocks=1, axes_dims=(4, 6, 6), tile_sizes=((32, 32),),
    )  # fmt: skip
    vae = diffusers.Kandinsky6SRVAE(
        latent_channels=4, encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4), layers_per_block=1,
    )  # fmt: skip
    pipe = assembled(
        "Kandinsky6SRPipeline",
        transformer=random_(transformer, 1),
        vae=random_(vae, 2),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    frames = normal(1, 5, 3, 24, 24).sigmoid()
    return Case(pipe, dict(video=frames, resolution_scale=2, output_type="pt"))


CASES = {
    "Kandinsky5T2VPipeline": text_to_video,
    "Kandinsky5I2VPipeline": image_to_video,
    "Kandinsky5T2IPipeline": text_to_image,
    "Kandinsky5I2IPipeline": image_to_image,
    "Kandinsky6TI2VAPipeline": text_to_video_and_audio,
    "Kandinsky6SRPipeline": super_resolution,
    "Kandinsky6SRPipeline: distilled": lambda: super_resolution(
        diffusers.PiflowScheduler(n_grid=4, num_policy_substeps=8), 4
    ),
}
