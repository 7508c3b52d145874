"""Wan, and the pipelines made of its parts: ChronoEdit, Lucy, AnyFlow."""

from __future__ import annotations

from typing import Any

from pipelines import diffusers
from video_parts import (
    LATENTS,
    SIZE,
    WAN_SIZES,
    Resized,
    film,
    flow_unipc,
    prompts,
    vision,
    with_wan_vae,
)
from zoo import Case, picture, random_

SIZES: dict[str, Any] = dict(WAN_SIZES, rope_max_seq_len=32)
"""Of a transformer, whatever its kind."""
IMAGE_WIDTH = 4
"""Of an encoded image's tokens."""


def transformer(kind: str = "WanTransformer3DModel", seed: int = 12, **config: Any) -> Any:
    return random_(getattr(diffusers, kind)(**SIZES | config), seed)


def wan() -> Case:
    """Wan 2.2 T2V A14B: a network for much noise, and another for little."""
    pipe = with_wan_vae(
        "WanPipeline",
        flow_unipc(3.0),
        transformer=transformer(),
        transformer_2=transformer(seed=13),
        boundary_ratio=0.875,
    )
    return Case(pipe, LATENTS | prompts() | {"num_frames": 5})


def wan_ti2v() -> Case:
    """Wan 2.2 TI2V 5B: the first frame's tokens are told another time."""
    pipe = with_wan_vae(
        "WanImageToVideoPipeline",
        flow_unipc(5.0),
        transformer=transformer(),
        expand_timesteps=True,
    )
    return Case(pipe, LATENTS | prompts() | {"num_frames": 5, "image": picture()})


def wan_image_to_video() -> Case:
    """Wan 2.2 I2V A14B."""
    pipe = with_wan_vae(
        "WanImageToVideoPipeline",
        flow_unipc(3.0),
        transformer=transformer(in_channels=36),
        transformer_2=transformer(in_channels=36, seed=13),
        boundary_ratio=0.9,
    )
    return Case(pipe, LATENTS | prompts() | {"num_frames": 5, "image": picture()})


def wan_video_to_video() -> Case:
    """Wan 2.1 T2V 1.3B, from a video noised up to a strength of 0.8."""
    pipe = with_wan_vae("WanVideoToVideoPipeline", flow_unipc(3.0), transformer=transformer())
    return Case(pipe, LATENTS | prompts() | {"video": film(5)})


def wan_vace() -> Case:
    """Wan 2.1 VACE, with half of each frame to be painted anew, and an image to refer to."""
    from PIL import Image

    pipe = with_wan_vae(
        "WanVACEPipeline",
        flow_unipc(3.0),
        transformer=transformer(
            "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=2 * 16 + 8 * 8
        ),
    )
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    given = {"video": film(5), "mask": [mask] * 5, "reference_images": [picture()]}
    return Case(pipe, LATENTS | prompts() | given | {"num_frames": 5})


def wan_animate() -> Case:
    """Wan 2.2 Animate, in two segments: the second one begins with the end of the first."""
    face = 16
    pipe = with_wan_vae(
        "WanAnimatePipeline",
        flow_unipc(5.0),
        transformer=transformer(
            "WanAnimateTransformer3DModel",
            in_channels=36,
            latent_channels=16,
            image_dim=IMAGE_WIDTH,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=face,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        **image_encoder(),
    )
    given = {
        "image": picture(),
        "pose_video": film(9),
        "face_video": film(9, face),
        "segment_frame_length": 5,
        "prev_segment_conditioning_frames": 1,
    }
    return Case(pipe, LATENTS | prompts() | given)


def chrono_edit() -> Case:
    pipe = with_wan_vae(
        "ChronoEditPipeline",
        flow_unipc(5.0),
        transformer=transformer(
            "ChronoEditTransformer3DModel", in_channels=36, image_dim=IMAGE_WIDTH
        ),
        **image_encoder(),
    )
    return Case(pipe, LATENTS | prompts() | {"image": picture()})


def lucy_edit() -> Case:
    """Lucy Edit 5B: the network takes a time for each token, here all equal."""
    pipe = with_wan_vae(
        "LucyEditPipeline",
        flow_unipc(5.0),
        transformer=transformer(in_channels=32),
        expand_timesteps=True,
    )
    return Case(pipe, LATENTS | prompts() | {"video": film(5), "num_frames": 5})


def _flow_map(name: str, kind: str, frames: int, **config: Any) -> Case:
    """Distilled, without guidance: the network is told both ends of a step."""
    pipe = with_wan_vae(
        name,
        diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=transformer(kind, gate_value=0.25, deltatime_type="r", **config),
    )
    words = {"prompt_embeds": prompts()["prompt_embeds"]}
    return Case(pipe, LATENTS | words | {"num_frames": frames})


def anyflow() -> Case:
    return _flow_map("AnyFlowPipeline", "AnyFlowTransformer3DModel", 5)


def anyflow_far() -> Case:
    """One part of the frames after another."""
    config = dict(compressed_patch_size=(1, 4, 4), full_chunk_limit=3, chunk_partition=(1, 1, 1))
    return _flow_map("AnyFlowFARPipeline", "AnyFlowFARTransformer3DModel", 9, **config)


def image_encoder() -> dict[str, Any]:
    return {"image_encoder": vision("CLIP", IMAGE_WIDTH), "image_processor": Resized()}


CASES = {
    "WanPipeline": wan,
    "WanImageToVideoPipeline": wan_image_to_video,
    "WanImageToVideoPipeline: TI2V": wan_ti2v,
    "WanVideoToVideoPipeline": wan_video_to_video,
    "WanVACEPipeline": wan_vace,
    "WanAnimatePipeline": wan_animate,
    "ChronoEditPipeline": chrono_edit,
    "LucyEditPipeline": lucy_edit,
    "AnyFlowPipeline": anyflow,
    "AnyFlowFARPipeline": anyflow_far,
}
