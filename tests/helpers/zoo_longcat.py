"""LongCat-Image, its editor, and LongCat-AudioDiT."""

from __future__ import annotations

from typing import Any

import diffusers
from stand_in_text import Letters, Reader
from zoo import Case, assembled, picture, random_


def _image(kind: str, vae: Any) -> Any:
    transformer = diffusers.LongCatImageTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return assembled(
        kind,
        transformer=random_(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=random_(vae, 2),
        text_encoder=Reader(),
        tokenizer=Letters(),
        text_processor=Letters(),
    )


def _vae(blocks: int) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, latent_channels=16, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * blocks, block_out_channels=(2,) * blocks,
        norm_num_groups=1, shift_factor=0.1, mid_block_add_attention=False,
    )  # fmt: skip


def text_to_image() -> Case:
    pipe = _image("LongCatImagePipeline", _vae(2))
    pipe.tokenizer_max_length = 32  # prompts are padded to 512 tokens
    return Case(
        pipe,
        dict(
            prompt="a cat", height=16, width=16, enable_prompt_rewrite=False, output_type="latent"
        ),
    )


def edit() -> Case:
    # It always works at 1024 x 1024 pixels, so that only the VAE can make the latents small.
    pipe = _image("LongCatImageEditPipeline", _vae(8))
    pipe.tokenizer_max_length = 32
    return Case(pipe, dict(prompt="a dog", image=picture(32), output_type="latent"))


def audio() -> Case:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=1, dit_heads=2, dit_text_dim=32, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1, channels=8, c_mults=[1, 2], strides=[2], latent_dim=8,
        encoder_latent_dim=16, downsampling_ratio=2, sample_rate=24000,
    )  # fmt: skip
    pipe = assembled(
        "LongCatAudioDiTPipeline",
        transformer=random_(transformer, 1),
        vae=random_(vae, 2),
        text_encoder=Reader(),
        tokenizer=Letters(),
    )
    return Case(
        pipe,
        dict(prompt="soft rain", audio_duration_s=0.002, output_type="latent"),
        note="inverted sigmas",
    )


CASES = {
    "LongCatImagePipeline": text_to_image,
    "LongCatImageEditPipeline": edit,
    "LongCatAudioDiTPipeline": audio,
}
