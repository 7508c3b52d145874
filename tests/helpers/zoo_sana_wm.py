"""Sana-WM: an image, a camera's way, and LTX-2's video autoencoder."""

from __future__ import annotations

from typing import Any

import complete
import zoo_ltx2
from pipelines import diffusers
from video_parts import LATENTS, SIZE, flow_euler, prompts
from zoo import Case, assembled, normal, picture, random_

_WIDTH = 8
"""Of a prompt's tokens."""


def world() -> Case:
    """The scheduler is told the time of every token."""
    network = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        caption_channels=_WIDTH,
    )
    pipe = assembled(
        "SanaWMPipeline",
        scheduler=flow_euler(),
        vae=zoo_ltx2.vae(),
        transformer=random_(network, 12),
    )
    words: dict[str, Any] = prompts(_WIDTH, mask="prompt_attention_mask")
    words = {k: v[:, None] if k.endswith("embeds") else v for k, v in words.items()}
    given = {
        "image": picture(SIZE),
        "prompt": "",
        "action": "w-8",
        "intrinsics": [20.0, 20.0, SIZE / 2, SIZE / 2],
        "num_frames": 9,
    }
    return Case(pipe, LATENTS | words | given)


def refinement() -> Case:
    """The second pass, distilled for a list of sigmas; three frames at a time.

    At noise level 0 the pipeline doesn't ask the scheduler.
    """
    tokenizer, encoder = complete._t5(8)
    pipe = assembled(
        "SanaWMLTX2Refiner",
        scheduler=flow_euler(),
        transformer=zoo_ltx2.transformer(
            "SanaWMLTX2RefinerTransformer3DModel", caption_channels=encoder.config.d_model
        ),
        connectors=zoo_ltx2.connectors(encoder.config.d_model),
        tokenizer=tokenizer,
        text_encoder=encoder,
        text_max_sequence_length=16,
    )
    sigmas = (0.909375, 0.8, 0.725, 0.421875, 0.0)
    given = {"sana_latent": normal(1, 4, 5, 4, 4), "prompt": "a cat", "fps": 16.0, "sigmas": sigmas}
    return Case(pipe, given | {"output_type": "latent"}, steps=None)


CASES = {"SanaWMPipeline": world, "SanaWMLTX2Refiner": refinement}
