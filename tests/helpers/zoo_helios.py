"""Helios: chunks of frames, one after the other."""

from __future__ import annotations

from typing import Any

from pipelines import diffusers
from video_parts import LATENTS, WAN_SIZES, prompts, with_wan_vae
from zoo import Case, random_


def _case(name: str, scheduler: Any, given: dict[str, Any]) -> Case:
    network = diffusers.HeliosTransformer3DModel(
        **WAN_SIZES,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    pipe = with_wan_vae(name, scheduler, transformer=random_(network, 12))
    sizes = {"num_frames": 10, "num_latent_frames_per_chunk": 2}
    return Case(pipe, LATENTS | prompts() | sizes | given)


def base() -> Case:
    """Helios-Base: one stage, UniPC."""
    scheduler = diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return _case("HeliosPipeline", scheduler, {})


def pyramid() -> Case:
    """Helios-Mid: three stages of resolution, with new noise between them, and steps for each.

    gamma is 1/3 as published, where a matrix that should be positive is not after rounding.
    """
    case = _case(
        "HeliosPyramidPipeline",
        diffusers.HeliosScheduler(gamma=0.33),
        {"pyramid_num_inference_steps_list": [2, 2, 2], "height": 64, "width": 64},
    )
    case.steps = None
    return case


CASES = {"HeliosPipeline": base, "HeliosPyramidPipeline": pyramid}
