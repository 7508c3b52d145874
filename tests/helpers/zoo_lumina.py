"""AuraFlow, Lumina and Lumina 2."""

from __future__ import annotations

from typing import Any

import pipelines
from pipelines import diffusers
from zoo import Case, assembled, random_
from zoo_sd3 import prompts

_SIZE = dict(height=32, width=32, output_type="latent")


def _case(kind: str, transformer: Any, given: dict[str, Any], **scheduler: Any) -> Case:
    pipe = assembled(
        kind,
        transformer=random_(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=random_(pipelines.vae(), 0),
    )
    return Case(pipe, given | _SIZE)


def _aura_flow() -> Case:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return _case("AuraFlowPipeline", transformer, prompts(5, 32, mask=True), shift=1.73)


def _lumina() -> Case:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=8,
        scaling_factor=1.0,
    )
    return _case("LuminaPipeline", transformer, prompts(5, 8, mask=True))


def _lumina2() -> Case:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    return _case(
        "Lumina2Pipeline", transformer, prompts(5, 8, mask=True), use_dynamic_shifting=True
    )


CASES = {
    "AuraFlowPipeline": _aura_flow,
    "LuminaPipeline": _lumina,
    "Lumina2Pipeline": _lumina2,
}
