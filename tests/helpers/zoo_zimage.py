"""Z-Image in its variants."""

from __future__ import annotations

from typing import Any

import pipelines
import torch
from pipelines import diffusers
from zoo import Case, assembled, normal, picture, random_

_SIZE = dict(height=32, width=32, output_type="latent")
_LAYERS = dict(dim=32, n_refiner_layers=2, n_heads=2, n_kv_heads=2)


def _transformer(**options: Any) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        n_layers=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        **_LAYERS,
        **options,
    )
    return random_(transformer, 1)


def _controlnet(channels: int) -> Any:
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0, 1],
        control_in_dim=channels,
        **_LAYERS,
    )
    return dict(controlnet=random_(controlnet, 5))


def _z_image(kind: str, parts: Any = None, **arguments: Any) -> Case:
    components = dict(
        transformer=_transformer(),
        vae=random_(pipelines.vae(), 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    prompts = dict(
        prompt_embeds=[normal(5, 16)],
        negative_prompt_embeds=[normal(4, 16, seed=1)],
        guidance_scale=2.0,
    )
    return Case(assembled(kind, **components | (parts or {})), prompts | _SIZE | arguments)


def _mask() -> Any:
    mask = picture(32, 2)
    mask.paste((0, 0, 0), (0, 0, 16, 32))
    return mask


class _Output(dict[str, Any]):
    __getattr__ = dict.__getitem__

    def to(self, device: Any) -> Any:
        return self


class _Siglip:
    """As much of SigLIP as the pipeline reads: features of the patches of an image."""

    def __call__(self, pixel_values: Any, spatial_shapes: Any) -> Any:
        return _Output(last_hidden_state=pixel_values)


class _SiglipProcessor:
    def __call__(self, images: Any, return_tensors: str) -> Any:
        return _Output(pixel_values=normal(1, 16, 8), spatial_shapes=torch.tensor([[4, 4]]))


def _omni() -> Case:
    parts = dict(
        transformer=_transformer(siglip_feat_dim=8),
        siglip=_Siglip(),
        vae=random_(pipelines.vae(), 0).to(torch.bfloat16),  # the only dtype that it takes
        siglip_processor=_SiglipProcessor(),
    )
    return _z_image(
        "ZImageOmniPipeline",
        parts,
        image=[picture(64, 1)],
        prompt_embeds=[[normal(5, 16), normal(3, 16, seed=2), normal(2, 16, seed=4)]],
        negative_prompt_embeds=[
            [normal(4, 16, seed=1), normal(3, 16, seed=3), normal(2, 16, seed=5)]
        ],
    )


CASES = {
    "ZImagePipeline": lambda: _z_image("ZImagePipeline"),
    "ZImageImg2ImgPipeline": lambda: _z_image(
        "ZImageImg2ImgPipeline", image=picture(32, 1), strength=0.6
    ),
    "ZImageInpaintPipeline": lambda: _z_image(
        "ZImageInpaintPipeline", image=picture(32, 1), mask_image=_mask(), strength=0.6
    ),
    "ZImageControlNetPipeline": lambda: _z_image(
        "ZImageControlNetPipeline", _controlnet(4), control_image=picture(32, 3)
    ),
    "ZImageControlNetInpaintPipeline": lambda: _z_image(
        "ZImageControlNetInpaintPipeline",
        _controlnet(9),
        control_image=picture(32, 3),
        image=picture(32, 1),
        mask_image=_mask(),
    ),
    "ZImageOmniPipeline": _omni,
}
