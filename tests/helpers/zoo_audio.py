"""Stable Audio 3 and ACE-Step."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from stand_in_text import Letters, Reader
from zoo import Case, assembled, normal, random_


def _stable_audio(kind: str, distilled: bool = False) -> Any:
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8, patch_size=1, embed_dim=32, depth=1, num_heads=4, cond_token_dim=16,
        global_cond_dim=16, local_add_cond_dim=9, timestep_features_dim=16,
        ff_mult=2, num_memory_tokens=3, use_differential_attention=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderSAME(
        audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,),
        encoder_strides=(2,), encoder_transformer_depths=(1,), latent_dim=8,
        use_differential_attention=False, dim_heads=4, ff_mult=2, sampling_rate=16,
    )  # fmt: skip
    return assembled(
        kind,
        transformer=random_(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1, stochastic_sampling=distilled
        ),
        vae=random_(vae, 2),
        duration_embedder=random_(StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16), 3),
    )


def _arguments(**more: Any) -> dict[str, Any]:
    return dict(prompt_embeds=normal(1, 5, 16), duration=1.0, output_type="latent", **more)


def stable_audio() -> Case:
    return Case(_stable_audio("StableAudio3Pipeline"), _arguments(), note="base model")


def stable_audio_distilled() -> Case:
    return Case(_stable_audio("StableAudio3Pipeline", True), _arguments())


def stable_audio_from_audio() -> Case:
    pipe = _stable_audio("StableAudio3AudioToAudioPipeline")
    return Case(pipe, _arguments(audio=normal(1, 2, 16), init_noise_level=0.7), note="base model")


def stable_audio_inpaint() -> Case:
    pipe = _stable_audio("StableAudio3InpaintPipeline")
    more = dict(audio=normal(1, 2, 16), mask_start_seconds=0.2, mask_end_seconds=0.6)
    return Case(pipe, _arguments(**more), note="base model")


class _ReaderOfLyrics(Reader):
    """Lyrics are only looked up, and encoded elsewhere."""

    def get_input_embeddings(self) -> Any:
        return lambda ids: self.words[ids]


def ace_step() -> Case:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    shared = dict(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=16,
    )  # fmt: skip
    transformer = diffusers.AceStepTransformer1DModel(
        num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **shared
    )
    encoder = AceStepConditionEncoder(
        text_hidden_dim=32, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, **shared,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
        decoder_input_channels=8, audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = assembled(
            "AceStepPipeline",
            vae=random_(vae, 3),
            text_encoder=_ReaderOfLyrics(),
            tokenizer=Letters(),
            transformer=random_(transformer, 1),
            condition_encoder=random_(encoder, 2),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        )
    return Case(
        pipe,
        dict(
            prompt="a piano",
            lyrics="la la",
            audio_duration=4.0,
            max_text_length=32,
            max_lyric_length=32,
            output_type="latent",
        ),
    )


CASES = {
    "StableAudio3Pipeline": stable_audio,
    "StableAudio3Pipeline: distilled": stable_audio_distilled,
    "StableAudio3AudioToAudioPipeline": stable_audio_from_audio,
    "StableAudio3InpaintPipeline": stable_audio_inpaint,
    "AceStepPipeline": ace_step,
}
