"""HiDream, CogView 4, GLM-Image, Ideogram 4 and Krea 2."""

from __future__ import annotations

from typing import Any

import pipelines
import torch
from pipelines import diffusers
from zoo import Case, assembled, normal, picture, random_
from zoo_sd3 import prompts

_SIZE = dict(height=32, width=32, output_type="latent")


def _hidream() -> Case:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=16,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    pipe = assembled(
        "HiDreamImagePipeline",
        transformer=random_(transformer, 1),
        vae=random_(pipelines.vae(), 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.default_sample_size = 16  # to whose area every size is scaled
    given: dict[str, Any] = dict(guidance_scale=2.0)
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds_t5"] = normal(1, 5, 32, seed=seed)
        given[f"{prefix}prompt_embeds_llama3"] = normal(2, 1, 5, 16, seed=2 + seed)
        given[f"{prefix}pooled_prompt_embeds"] = normal(1, 16, seed=4 + seed)
    return Case(pipe, given | _SIZE)


def _linear_shift() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )


def _cogview4(kind: str, channels: int = 4, **arguments: Any) -> Case:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
    )
    pipe = assembled(
        kind,
        transformer=random_(transformer, 1),
        vae=random_(pipelines.vae(), 0),
        scheduler=_linear_shift(),
    )
    return Case(pipe, prompts(5, 32) | _SIZE | arguments)


def _glm_image() -> Case:
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=128,
    )
    pipe = assembled(
        "GlmImagePipeline",
        transformer=random_(transformer, 1),
        vae=random_(pipelines.vae(), 0),
        scheduler=_linear_shift(),
    )
    tokens = torch.arange(64).reshape(1, 64) * 17 % 128
    return Case(pipe, prompts(5, 16) | _SIZE | dict(prior_token_ids=tokens, guidance_scale=2.0))


def _ideogram4() -> Case:
    def transformer(seed: int) -> Any:
        network = diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
        )
        return random_(network, seed)

    pipe = assembled(
        "Ideogram4Pipeline",
        transformer=transformer(1),
        unconditional_transformer=transformer(2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )

    def encode_prompt(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any):
        length = max_sequence_length + grid_h * grid_w
        ids = pipe._prepare_ids([5], grid_h, grid_w, max_sequence_length, device)
        return normal(1, length, 16), *ids

    pipe.encode_prompt = encode_prompt  # it takes no encoded prompts
    arguments = dict(prompt="unused", guidance_scale=2.0, guidance_schedule=None)
    return Case(pipe, arguments | _SIZE | dict(height=64, width=64, max_sequence_length=8))


def _krea2() -> Case:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    pipe = assembled(
        "Krea2Pipeline",
        transformer=random_(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    given: dict[str, Any] = dict(guidance_scale=2.0)
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds"] = normal(1, 5, 3, 16, seed=seed)
        given[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.bool)
    return Case(pipe, given | _SIZE | dict(height=64, width=64))


CASES = {
    "HiDreamImagePipeline": _hidream,
    "CogView4Pipeline": lambda: _cogview4("CogView4Pipeline"),
    "CogView4ControlPipeline": lambda: _cogview4(
        "CogView4ControlPipeline", 8, control_image=picture(32, 3)
    ),
    "GlmImagePipeline": _glm_image,
    "Ideogram4Pipeline": _ideogram4,
    "Krea2Pipeline": _krea2,
}
