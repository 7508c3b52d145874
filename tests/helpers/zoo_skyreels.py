"""SkyReels-V2: UniPC with a flow shift of 8 for text, and of 5 for images.

Its pipelines with diffusion forcing copy the scheduler for each frame of the latents.
"""

from __future__ import annotations

from typing import Any

from video_parts import LATENTS, film, flow_unipc, prompts, with_wan_vae
from zoo import Case, picture
from zoo_wan import IMAGE_WIDTH, image_encoder, transformer

_FORCED: dict[str, Any] = {"num_frames": 9, "base_num_frames": 9}


def _network(**config: Any) -> Any:
    return transformer("SkyReelsV2Transformer3DModel", **config)


def text() -> Case:
    pipe = with_wan_vae("SkyReelsV2Pipeline", flow_unipc(8.0), transformer=_network())
    return Case(pipe, LATENTS | prompts() | {"num_frames": 5})


def image() -> Case:
    pipe = with_wan_vae(
        "SkyReelsV2ImageToVideoPipeline",
        flow_unipc(5.0),
        transformer=_network(in_channels=36, image_dim=IMAGE_WIDTH),
        **image_encoder(),
    )
    given = {"image": picture(), "num_frames": 5}
    return Case(pipe, LATENTS | prompts() | given)


def _forcing(given: dict[str, Any]) -> Case:
    pipe = with_wan_vae(
        "SkyReelsV2DiffusionForcingPipeline",
        flow_unipc(8.0),
        transformer=_network(inject_sample_info=True),
    )
    return Case(pipe, LATENTS | prompts() | _FORCED | {"prompt": None} | given)


def forcing() -> Case:
    """All frames at the same noise level, which is the default."""
    return _forcing({})


def forcing_one_after_another() -> Case:
    """Each frame two steps behind the one before."""
    return _forcing({"ar_step": 2, "causal_block_size": 1})


def forcing_image() -> Case:
    pipe = with_wan_vae(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", flow_unipc(5.0), transformer=_network()
    )
    return Case(pipe, LATENTS | prompts() | _FORCED | {"image": picture()})


def forcing_video() -> Case:
    """Longer than one pass: each pass begins with the last frames of the one before."""
    pipe = with_wan_vae(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline", flow_unipc(5.0), transformer=_network()
    )
    given = {"video": film(5), "num_frames": 17, "base_num_frames": 9, "overlap_history": 5}
    return Case(pipe, LATENTS | prompts() | given)


CASES = {
    "SkyReelsV2Pipeline": text,
    "SkyReelsV2ImageToVideoPipeline": image,
    "SkyReelsV2DiffusionForcingPipeline": forcing,
    "SkyReelsV2DiffusionForcingPipeline: asynchronous": forcing_one_after_another,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": forcing_image,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": forcing_video,
}
