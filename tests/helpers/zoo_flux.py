"""FLUX.1, FLUX.2 and Chroma."""

from __future__ import annotations

import functools
from typing import Any

import pipelines
import torch
from pipelines import diffusers, flux_transformer
from zoo import Case, assembled, flux2_vae, normal, picture, random_

_SIZE = dict(height=32, width=32, output_type="latent")
_SHARED = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)


def _scheduler(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        **{"shift": 3.0, "use_dynamic_shifting": True, **options}
    )


def _vae() -> Any:
    return random_(pipelines.vae(), 0)


def _images() -> dict[str, Any]:
    """An image to change, entered at 60 % of noise."""
    return dict(image=picture(32, 1), strength=0.6)


def _mask() -> Any:
    """Noise beside a blank."""
    mask = picture(32, 2)
    mask.paste((0, 0, 0), (0, 0, 16, 32))
    return mask


def _flux(kind: str, channels: int = 16, parts: Any = None, **arguments: Any) -> Case:
    """channels: that the transformer reads; it returns 16."""
    pipe = assembled(
        kind,
        transformer=flux_transformer(in_channels=channels, out_channels=16),
        scheduler=_scheduler(),
        vae=_vae(),
        **{name: build() for name, build in (parts or {}).items()},
    )
    prompts = dict(prompt_embeds=normal(1, 5, 32), pooled_prompt_embeds=normal(1, 16, seed=1))
    return Case(pipe, prompts | _SIZE | arguments)


def _controlnet() -> Any:
    return random_(
        diffusers.FluxControlNetModel(
            patch_size=1,
            in_channels=16,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
            **_SHARED,
        ),
        5,
    )


_CONTROLLED = functools.partial(
    _flux, parts=dict(controlnet=_controlnet), control_image=picture(32, 3)
)
_UNSCALED = dict(max_area=32 * 32, _auto_resize=False)


def _negative() -> dict[str, Any]:
    """For true classifier-free guidance."""
    return dict(
        negative_prompt_embeds=normal(1, 5, 32, seed=2),
        negative_pooled_prompt_embeds=normal(1, 16, seed=3),
        true_cfg_scale=2.0,
    )


def _flux2(kind: str, guidance: bool, **arguments: Any) -> Case:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance,
        **_SHARED,
    )
    vae = random_(flux2_vae(8, 16), 0)
    pipe = assembled(kind, transformer=random_(transformer, 2), vae=vae, scheduler=_scheduler())
    return Case(pipe, dict(prompt_embeds=normal(1, 5, 16)) | _SIZE | arguments)


def _klein(kind: str = "Flux2KleinPipeline", **arguments: Any) -> Case:
    return _flux2(
        kind,
        False,
        negative_prompt_embeds=normal(1, 5, 16, seed=2),
        guidance_scale=3.0,
        **arguments,
    )


def _chroma(kind: str, **arguments: Any) -> Case:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
        **_SHARED,
    )
    note = ""
    if kind == "ChromaInpaintPipeline":
        note = "with guidance_embeds=False in its transformer's configuration, which it lacks"
        transformer.register_to_config(guidance_embeds=False)
    pipe = assembled(kind, transformer=random_(transformer, 2), vae=_vae(), scheduler=_scheduler())
    prompts = dict(
        prompt_embeds=normal(1, 5, 32),
        negative_prompt_embeds=normal(1, 5, 32, seed=2),
        prompt_attention_mask=torch.ones(1, 5),
        negative_prompt_attention_mask=torch.ones(1, 5),
        guidance_scale=3.0,
    )
    return Case(pipe, prompts | _SIZE | arguments, note=note)


CASES = {
    "FluxPipeline": lambda: _flux("FluxPipeline", **_negative()),
    "FluxImg2ImgPipeline": lambda: _flux("FluxImg2ImgPipeline", **_images()),
    "FluxInpaintPipeline": lambda: _flux("FluxInpaintPipeline", mask_image=_mask(), **_images()),
    "FluxFillPipeline": lambda: _flux(
        "FluxFillPipeline", 48, mask_image=_mask(), **_images() | dict(strength=1.0)
    ),
    "FluxControlPipeline": lambda: _flux("FluxControlPipeline", 32, control_image=picture(32, 3)),
    "FluxControlImg2ImgPipeline": lambda: _flux(
        "FluxControlImg2ImgPipeline", 32, control_image=picture(32, 3), **_images()
    ),
    "FluxControlInpaintPipeline": lambda: _flux(
        "FluxControlInpaintPipeline",
        32,
        control_image=picture(32, 3),
        mask_image=_mask(),
        **_images(),
    ),
    "FluxControlNetPipeline": lambda: _CONTROLLED("FluxControlNetPipeline"),
    "FluxControlNetImg2ImgPipeline": lambda: _CONTROLLED(
        "FluxControlNetImg2ImgPipeline", **_images()
    ),
    "FluxControlNetInpaintPipeline": lambda: _CONTROLLED(
        "FluxControlNetInpaintPipeline", mask_image=_mask(), **_images()
    ),
    "FluxKontextPipeline": lambda: _flux("FluxKontextPipeline", image=picture(32, 1), **_UNSCALED),
    "FluxKontextInpaintPipeline": lambda: _flux(
        "FluxKontextInpaintPipeline", mask_image=_mask(), **_images(), **_UNSCALED
    ),
    "Flux2Pipeline": lambda: _flux2("Flux2Pipeline", True),
    "Flux2KleinPipeline": _klein,
    "Flux2KleinInpaintPipeline": lambda: _klein(
        "Flux2KleinInpaintPipeline", mask_image=_mask(), **_images()
    ),
    "Flux2KleinKVPipeline": lambda: _flux2("Flux2KleinKVPipeline", False, image=picture(64, 1)),
    "ChromaPipeline": lambda: _chroma("ChromaPipeline"),
    "ChromaImg2ImgPipeline": lambda: _chroma("ChromaImg2ImgPipeline", **_images()),
    "ChromaInpaintPipeline": lambda: _chroma(
        "ChromaInpaintPipeline", mask_image=_mask(), **_images()
    ),
}
