"""What the zoo's video pipelines share: parts, and what a call is given."""

from __future__ import annotations

from typing import Any

import torch
from pipelines import diffusers
from torch import Tensor
from zoo import assembled, normal, picture, random_

SIZE = 32
"""Pixels of a side."""
LATENTS: dict[str, Any] = dict(height=SIZE, width=SIZE, output_type="latent")
"""Arguments of most calls."""
WAN_SIZES: dict[str, Any] = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=32,
    num_layers=1,
    cross_attn_norm=True,
)
"""Of the transformers of Wan's kin."""


def flow_unipc(shift: float, **config: Any) -> Any:
    """UniPC on flow sigmas, as the checkpoints of Wan and its kin name it."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **config
    )


def flow_euler(shift: float = 1.0, **config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def wan_vae(**config: Any) -> Any:
    """8 times smaller in space, 4 times in time, 16 channels."""
    sizes = dict(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return random_(diffusers.AutoencoderKLWan(**sizes | config), 11)


def prompts(width: int = 32, length: int = 6, mask: str = "") -> dict[str, Tensor]:
    """An encoded prompt (1, length, width) and a negative one; masks if their name is given.

    The negative one is a token shorter, where there are masks.
    """
    given = {}
    for seed, sign in enumerate(("", "negative_"), 20):
        given[f"{sign}prompt_embeds"] = normal(1, length, width, seed=seed)
        if mask:
            given[sign + mask] = torch.ones(1, length, dtype=torch.int64)
    if mask:
        given[f"negative_{mask}"][:, -1] = 0
    return given


def film(frames: int, size: int = SIZE, seed: int = 30) -> list[Any]:
    """PIL images."""
    return [picture(size, seed + frame) for frame in range(frames)]


def with_wan_vae(name: str, scheduler: Any, **parts: Any) -> Any:
    return assembled(name, scheduler=scheduler, vae=wan_vae(), **parts)


class Resized:
    """In the place of transformers' image processors, which need torchvision."""

    size = 16

    def __call__(self, images: Any, **options: Any) -> Any:
        from transformers import BatchFeature

        if not isinstance(images, Tensor):
            pixels = torch.frombuffer(bytearray(images.tobytes()), dtype=torch.uint8)
            images = pixels.view(images.height, images.width, 3).permute(2, 0, 1)[None] / 255
        images = torch.nn.functional.interpolate(images.float(), (self.size,) * 2, mode="bilinear")
        return BatchFeature({"pixel_values": 2 * images - 1})

    preprocess = __call__


def vision(kind: str, width: int) -> Any:
    """An encoder of images, CLIP or Siglip: four tokens, and CLIP's one for all."""
    import transformers

    config = getattr(transformers, f"{kind}VisionConfig")(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=Resized.size,
        patch_size=8,
    )
    return random_(getattr(transformers, f"{kind}VisionModel")(config), 17)
