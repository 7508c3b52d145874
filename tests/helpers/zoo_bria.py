"""Bria 3.2, Fibo, its editor, and Fibo 2."""

from __future__ import annotations

from typing import Any

import diffusers
import pipelines
from stand_in_text import Letters, Reader
from zoo import Case, assembled, flux2_vae, normal, picture, random_


def _scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def bria() -> Case:
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    pipe = assembled(
        "BriaPipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(),
        vae=pipelines.vae(),
    )
    return Case(
        pipe,
        dict(
            prompt_embeds=normal(1, 5, 32),
            negative_prompt_embeds=normal(1, 5, 32, seed=1),
            height=32,
            width=32,
            output_type="latent",
        ),
    )


def _fibo(kind: str) -> Any:
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=64, text_encoder_dim=32,
        axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=12,
        out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    return assembled(
        kind,
        transformer=random_(transformer, 1),
        scheduler=_scheduler(),
        vae=random_(vae, 2),
        text_encoder=Reader(),
        tokenizer=Letters(),
    )


def bria_fibo() -> Case:
    pipe = _fibo("BriaFiboPipeline")
    return Case(pipe, dict(prompt='{"text": "a cat"}', height=64, width=64, output_type="latent"))


def bria_fibo_edit() -> Case:
    return Case(
        _fibo("BriaFiboEditPipeline"),
        dict(
            prompt='{"text": "a cat", "edit_instruction": "a dog"}',
            image=picture(64),
            height=64,
            width=64,
            output_type="latent",
        ),
    )


def bria_fibo_2() -> Case:
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2,
        max_num_gist_tokens=4, gist_step=2, axes_dims=(4, 4, 4), axes_lens=(32, 32, 32),
    )  # fmt: skip
    pipe = assembled(
        "BriaFibo2Pipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(),
        vae=random_(flux2_vae(8, 8), 2),
    )
    return Case(
        pipe,
        dict(
            prompt_embeds=normal(1, 2, 5, 16),
            negative_prompt_embeds=normal(1, 2, 5, 16, seed=1),
            image=picture(32),
            height=32,
            width=32,
            output_type="latent",
        ),
    )


CASES = {
    "BriaPipeline": bria,
    "BriaFiboPipeline": bria_fibo,
    "BriaFiboEditPipeline": bria_fibo_edit,
    "BriaFibo2Pipeline": bria_fibo_2,
}
