"""Qwen-Image in its variants."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from pipelines import diffusers
from zoo import Case, assembled, normal, picture, random_

_SIZE = dict(height=32, width=32, output_type="latent")
_LAYERS = dict(attention_head_dim=16, num_attention_heads=2, num_layers=2)


def _transformer(channels: int = 4, **options: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * channels,
        out_channels=channels,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **_LAYERS,
        **options,
    )
    return random_(transformer, 1)


def _vae(channels: int = 4, **options: Any) -> Any:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * channels,
        latents_std=[0.9] * channels,
        **options,
    )
    return random_(vae, 0)


def _scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"
    )


def _prompts(true_cfg: bool = True) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds"] = normal(1, 5, 16, seed=seed)
        given[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.long)
    return given | dict(true_cfg_scale=2.0 if true_cfg else 1.0)


def _qwen(kind: str, parts: Any = None, **arguments: Any) -> Case:
    components = dict(transformer=_transformer(), vae=_vae(), scheduler=_scheduler())
    return Case(assembled(kind, **components | (parts or {})), _prompts() | _SIZE | arguments)


def _mask() -> Any:
    mask = picture(32, 2)
    mask.paste((0, 0, 0), (0, 0, 16, 32))
    return mask


def _controlnet(extra: int = 0) -> Any:
    controlnet = diffusers.QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        extra_condition_channels=extra,
        **_LAYERS | dict(num_layers=1),
    )
    return dict(controlnet=random_(controlnet, 5))


def _small_images(pipeline: str) -> None:
    """These scale every image to a constant area of a megapixel. Here it is of 32 by 32 pixels."""
    module: Any = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_{pipeline}")
    original = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio: original(32 * 32, ratio)


def _edit(kind: str, pipeline: str, parts: Any = None, **arguments: Any) -> Case:
    _small_images(pipeline)
    return _qwen(kind, parts, **dict(image=picture(32, 1)) | arguments)


def _layered() -> Case:
    parts = dict(
        # Not 4 channels, or images with alpha would be taken for latents.
        transformer=_transformer(8, use_additional_t_cond=True, use_layer3d_rope=True),
        vae=_vae(8, input_channels=4),
        text_encoder=_TextEncoder(),
    )
    case = _edit(
        "QwenImageLayeredPipeline",
        "qwenimage_layered",
        parts,
        image=picture(32, 1).convert("RGBA"),
        prompt="unused",
        layers=2,
        output_type="pt",  # it can't return latents
    )
    del case.arguments["height"], case.arguments["width"]
    return case


class _TextEncoder:
    """As much of a text encoder as a pipeline reads that is given encoded prompts."""

    dtype = torch.float32


class _Processor:
    """As much of a processor as a pipeline reads that is given encoded prompts."""

    tokenizer = SimpleNamespace(encode=lambda text: [7])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[1, 2, 3]]


def _qwen21() -> Case:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, context_in_dim=16, axes_dims_rope=(4, 6, 6), **_LAYERS
    )
    pipe = assembled(
        "QwenImage21Pipeline",
        transformer=random_(transformer, 1),
        scheduler=_scheduler(),
        processor=_Processor(),
    )
    return Case(pipe, _prompts() | dict(height=64, width=64, output_type="latent"))


CASES = {
    "QwenImagePipeline": lambda: _qwen("QwenImagePipeline"),
    "QwenImageImg2ImgPipeline": lambda: _qwen(
        "QwenImageImg2ImgPipeline", image=picture(32, 1), strength=0.6
    ),
    "QwenImageInpaintPipeline": lambda: _qwen(
        "QwenImageInpaintPipeline", image=picture(32, 1), mask_image=_mask(), strength=0.6
    ),
    "QwenImageControlNetPipeline": lambda: _qwen(
        "QwenImageControlNetPipeline", _controlnet(), control_image=picture(32, 3)
    ),
    "QwenImageControlNetInpaintPipeline": lambda: _qwen(
        "QwenImageControlNetInpaintPipeline",
        _controlnet(4),
        control_image=picture(32, 3),
        control_mask=_mask(),
    ),
    "QwenImageEditPipeline": lambda: _edit("QwenImageEditPipeline", "qwenimage_edit"),
    "QwenImageEditInpaintPipeline": lambda: _edit(
        "QwenImageEditInpaintPipeline", "qwenimage_edit_inpaint", mask_image=_mask(), strength=0.6
    ),
    "QwenImageEditPlusPipeline": lambda: _edit("QwenImageEditPlusPipeline", "qwenimage_edit_plus"),
    "QwenImageLayeredPipeline": _layered,
    "QwenImage21Pipeline": _qwen21,
}
