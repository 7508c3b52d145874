"""Sana, Sana-Video and Sana-WM."""

from __future__ import annotations

from typing import Any

from pipelines import diffusers
from video_parts import LATENTS, SIZE, flow_euler, prompts, with_wan_vae
from zoo import Case, assembled, normal, picture, random_

_WIDTH = 8
"""Of a prompt's tokens."""
_SIZES: dict[str, Any] = dict(
    in_channels=4,
    out_channels=4,
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=4,
    num_cross_attention_heads=2,
    cross_attention_head_dim=4,
    cross_attention_dim=8,
    caption_channels=_WIDTH,
    sample_size=32,
)
_BINS = {"use_resolution_binning": False}
"""Sizes as they are given; else the next one of a table for large images is taken."""


def _flow_dpm(shift: float) -> Any:
    """The solver that Sana's checkpoints name."""
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def _vae() -> Any:
    """Half as large in space, 4 channels."""
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return random_(vae, 11)


def _transformer(kind: str = "SanaTransformer2DModel", seed: int = 12, **config: Any) -> Any:
    return random_(getattr(diffusers, kind)(**_SIZES | config), seed)


def _image(name: str, scheduler: Any, given: dict[str, Any], **parts: Any) -> Case:
    pipe = assembled(name, scheduler=scheduler, vae=_vae(), **parts)
    words = prompts(_WIDTH, mask="prompt_attention_mask")
    return Case(pipe, LATENTS | _BINS | words | {"negative_prompt": None} | given)


def sana() -> Case:
    return _image("SanaPipeline", _flow_dpm(3.0), {}, transformer=_transformer())


def sana_controlnet() -> Case:
    return _image(
        "SanaControlNetPipeline",
        flow_euler(3.0),
        {"control_image": normal(1, 3, SIZE, SIZE).clamp(-1, 1)},
        transformer=_transformer(),
        controlnet=_transformer("SanaControlNetModel", 13),
    )


def _sprint(name: str, given: dict[str, Any]) -> Case:
    network = _transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    case = _image(name, diffusers.SCMScheduler(), given, transformer=network)
    for key in [key for key in case.arguments if key.startswith("negative_")]:
        del case.arguments[key]
    return case


def sana_sprint() -> Case:
    """Consistency in a trigonometric time. The middle of two steps is a default; here are more."""
    return _sprint("SanaSprintPipeline", {"intermediate_timesteps": None})


def sana_sprint_image() -> Case:
    given = {"image": picture(SIZE), "strength": 0.6, "intermediate_timesteps": None}
    return _sprint("SanaSprintImg2ImgPipeline", given)


def _video(name: str, scheduler: Any, given: dict[str, Any]) -> Case:
    network = diffusers.SanaVideoTransformer3DModel(
        **_SIZES
        | dict(
            in_channels=16,
            out_channels=16,
            attention_head_dim=12,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            sample_size=30,
            rope_max_seq_len=32,
        )
    )
    pipe = with_wan_vae(name, scheduler, transformer=random_(network, 14))
    words = prompts(_WIDTH, mask="prompt_attention_mask")
    return Case(pipe, LATENTS | _BINS | words | {"negative_prompt": None, "frames": 5} | given)


def sana_video() -> Case:
    return _video("SanaVideoPipeline", _flow_dpm(8.0), {})


def sana_video_image() -> Case:
    """The first frame is the image, and isn't given to the scheduler."""
    return _video("SanaImageToVideoPipeline", flow_euler(8.0), {"image": picture(SIZE)})


CASES = {
    "SanaPipeline": sana,
    "SanaControlNetPipeline": sana_controlnet,
    "SanaSprintPipeline": sana_sprint,
    "SanaSprintImg2ImgPipeline": sana_sprint_image,
    "SanaVideoPipeline": sana_video,
    "SanaImageToVideoPipeline": sana_video_image,
}
