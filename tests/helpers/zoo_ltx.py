"""LTX-Video."""

from __future__ import annotations

from typing import Any

import complete
from pipelines import diffusers
from video_parts import LATENTS, SIZE, flow_euler, prompts
from zoo import Case, assembled, picture, random_

_WIDTH = 32
"""Of a prompt's tokens."""


def dynamic_euler(**config: Any) -> Any:
    """The scheduler of LTX-Video up to 0.9.1 and of LTX-2: its last noise level before 0 is 0.1."""
    sizes = dict(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return flow_euler(**sizes | config)


def _vae() -> Any:
    """8 times smaller in space and time, 8 channels."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        decoder_causal=False,
    )
    return random_(vae, 11)


def _case(name: str, scheduler: Any, given: dict[str, Any], **parts: Any) -> Case:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=_WIDTH,
        num_layers=1,
        caption_channels=_WIDTH,
    )
    pipe = assembled(
        name, scheduler=scheduler, vae=_vae(), transformer=random_(network, 12), **parts
    )
    return Case(pipe, LATENTS | {"num_frames": 9} | given)


def _words() -> dict[str, Any]:
    return prompts(_WIDTH, mask="prompt_attention_mask")


def text() -> Case:
    return _case("LTXPipeline", dynamic_euler(), _words())


def image() -> Case:
    """The first frame is the image, and isn't given to the scheduler."""
    return _case("LTXImageToVideoPipeline", dynamic_euler(), _words() | {"image": picture(SIZE)})


def condition() -> Case:
    """LTX-Video 0.9.5. The scheduler is told the time of every token."""
    return _case("LTXConditionPipeline", flow_euler(), _words() | {"image": picture(SIZE)})


def long_video(scheduler: Any = None) -> Case:
    """Windows over time; the pipeline encodes the prompt itself, and leaves out the last time."""
    tokenizer, encoder = complete._t5(8)
    return _case(
        "LTXI2VLongMultiPromptPipeline",
        scheduler or diffusers.LTXEulerAncestralRFScheduler(),
        {
            "prompt": "a cat | a dog",
            "num_frames": 17,
            "temporal_tile_size": 16,
            "temporal_overlap": 8,
            "max_sequence_length": 16,
        },
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def long_video_euler() -> Case:
    """With the last time, the last step is left out."""
    return long_video(flow_euler())


CASES = {
    "LTXPipeline": text,
    "LTXImageToVideoPipeline": image,
    "LTXConditionPipeline": condition,
    "LTXI2VLongMultiPromptPipeline": long_video,
    "LTXI2VLongMultiPromptPipeline: Euler": long_video_euler,
}
