"""LTX-2: video and sound. Pipelines copy the scheduler for the sound, and divide by its sigmas."""

from __future__ import annotations

import importlib
from typing import Any

from pipelines import diffusers
from video_parts import LATENTS, SIZE, prompts
from zoo import Case, assembled, normal, picture, random_
from zoo_ltx import dynamic_euler

WIDTH, LAYERS = 16, 2
"""Of the text encoder, all whose layers are taken."""


def _part(module: str, name: str) -> Any:
    """What diffusers has in its folder of LTX-2 alone."""
    return getattr(importlib.import_module(f"diffusers.pipelines.ltx2.{module}"), name)


def transformer(kind: str = "LTX2VideoTransformer3DModel", **config: Any) -> Any:
    sizes = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    return random_(getattr(diffusers, kind)(**sizes | config), 12)


def connectors(width: int = WIDTH) -> Any:
    heads = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 2),
            ("attention_head_dim", width // 2),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    network = _part("connectors", "LTX2TextConnectors")(
        caption_channels=width,
        text_proj_in_factor=LAYERS,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **heads,
    )
    return random_(network, 13)


def vae() -> Any:
    """8 times smaller in space and time, 4 channels."""
    network = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 4,
        spatio_temporal_scaling=(True,) * 3,
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        downsample_type=("spatiotemporal",) * 3,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=1,
        patch_size_t=1,
        decoder_causal=False,
    )
    network.use_framewise_encoding = network.use_framewise_decoding = False
    return random_(network, 11)


def _sound() -> dict[str, Any]:
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = _part("vocoder", "LTX2Vocoder")(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    return {"audio_vae": random_(audio_vae, 14), "vocoder": random_(vocoder, 15)}


def _case(name: str, given: dict[str, Any], scheduler: Any = None, **parts: Any) -> Case:
    pipe = assembled(
        name,
        scheduler=scheduler or dynamic_euler(),
        vae=vae(),
        connectors=connectors(),
        **{"transformer": transformer()} | _sound() | parts,
    )
    words = prompts(WIDTH * LAYERS, mask="prompt_attention_mask")
    return Case(pipe, LATENTS | words | {"num_frames": 9} | given)


_GUIDANCE: dict[str, Any] = {"spatio_temporal_guidance_blocks": [0]}
"""Layer 28 by default, which these small networks don't have."""


def text() -> Case:
    return _case("LTX2Pipeline", _GUIDANCE)


def image() -> Case:
    return _case("LTX2ImageToVideoPipeline", _GUIDANCE | {"image": picture(SIZE), "image_crf": 0})


def condition() -> Case:
    """The tokens of the first frame are told a lower time; the scheduler isn't."""
    kind = _part("pipeline_ltx2_condition", "LTX2VideoCondition")
    given = kind(frames=picture(SIZE), index=0, strength=0.8, crf=0)
    return _case("LTX2ConditionPipeline", _GUIDANCE | {"conditions": given})


def in_context_video() -> Case:
    kind = _part("pipeline_ltx2_ic_lora", "LTX2ReferenceCondition")
    given = kind(frames=picture(SIZE), strength=1.0)
    return _case("LTX2InContextPipeline", _GUIDANCE | {"reference_conditions": given})


def high_dynamic_range() -> Case:
    """The sound's scheduler is moved along with velocities of zero."""
    kind = _part("pipeline_ltx2_hdr_lora", "LTX2HDRReferenceCondition")
    given = kind(frames=normal(1, 3, SIZE, SIZE).sigmoid(), strength=1.0)
    return _case("LTX2HDRPipeline", {"reference_conditions": given})


def _keyframed(name: str, given: dict[str, Any], scheduler: Any = None, **parts: Any) -> Case:
    """LTX-2.5, distilled: it has a list of sigmas, and no number of steps, nor guidance."""
    network = transformer(use_keyframes_abs_pos_embedding=True)
    case = _case(name, given, scheduler, transformer=network, **parts)
    for key in [key for key in case.arguments if key.startswith("negative_")]:
        del case.arguments[key]
    case.steps = None
    return case


def _fixed_euler() -> Any:
    return dynamic_euler(use_dynamic_shifting=False, shift_terminal=None)


def keyframes() -> Case:
    """Its default are eight sigmas; as many as the walk's plans have steps are compared."""
    given = {"sigmas": [1.0, 0.909375, 0.725, 0.421875]}
    return _keyframed("LTX2DFRPipeline", given, _fixed_euler())


def temporal_refinement() -> Case:
    """Twice as many frames; stochastic."""
    upsampler = _part("latent_upsampler", "LTX2LatentUpsamplerModel")(
        in_channels=4,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=False,
        temporal_upsample=True,
    )
    side, frames = SIZE // 8, 2
    given = {
        "latents": normal(1, 4, frames, side, side),
        "keyframes_latents": normal(1, 4, 1, side, side, seed=1),
        "keyframe_positions": [8],
        "audio_latents": normal(1, 2, 9, 2, seed=2),
    }
    return _keyframed(
        "LTX2DFRTemporalRefinePipeline",
        given,
        diffusers.LTXEulerAncestralRFScheduler(eta=0.5),
        temporal_latent_upsampler=random_(upsampler, 16),
    )


def decoding() -> Case:
    """Latents to frames by a small network of its own steps; its scheduler isn't used."""
    decoder = diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=8,
        patch_size=2,
        decoder_head_dim=16,
        decoder_stage_channels=(64, 32, 16, 16, 16),
        decoder_stage_depths=(1,) * 5,
        decoder_stage_kernels=((3, 3, 3),) * 4,
        decoder_upsample_strides=((1, 2, 2), (2, 1, 1), (2, 1, 1), (2, 2, 2)),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=32,
        spatial_compression_ratio=8,
    )
    pipe = assembled(
        "LTX2VideoDiffusionDecodePipeline",
        diffusion_decoder=random_(decoder, 18),
        scheduler=dynamic_euler(),
    )
    return Case(pipe, {"latents": normal(1, 8, 2, 3, 3), "output_type": "pt"}, steps=None)


CASES = {
    "LTX2Pipeline": text,
    "LTX2ImageToVideoPipeline": image,
    "LTX2ConditionPipeline": condition,
    "LTX2InContextPipeline": in_context_video,
    "LTX2HDRPipeline": high_dynamic_range,
    "LTX2DFRPipeline": keyframes,
    "LTX2DFRTemporalRefinePipeline": temporal_refinement,
    "LTX2VideoDiffusionDecodePipeline": decoding,
}
