"""The networks of diffusers that take prompts, by the name of their class."""

from __future__ import annotations

from typing import Any

from .network_2rf import TwoRF
from .network_flux import Flux
from .network_flux2 import Flux2
from .network_qwen_image import QwenImage
from .network_sd3 import SD3
from .network_wan import Wan
from .network_z_image import ZImage
from .prompt_kind import Kind, original, type_name

KINDS: dict[str, Kind] = {
    "UNet2DConditionModel": TwoRF(),
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
    "Flux2Transformer2DModel": Flux2(),
    "QwenImageTransformer2DModel": QwenImage(),
    "ZImageTransformer2DModel": ZImage(),
    "WanTransformer3DModel": Wan(),
}

# Parts of the names of pipelines whose networks read an image or video beside the latents, and are
# called with more tokens for it. Channels that are read for it show in the configuration.
_CONDITIONED = ("Kontext", "Edit", "Layered", "Omni", "VACE", "Animate", "ImageToVideo", "KleinKV")


def kind_of(module: Any, role: str = "a text-to-image network") -> Kind:
    """How a network is called; compiled ones are as the one inside.

    Raises TypeError for another class of network.
    """
    name = type_name(module)
    if name not in KINDS:
        raise TypeError(f"{role} must be one of {', '.join(KINDS)}, got {name}")
    return KINDS[name]


def check_text_alone(module: Any, pipe: Any = None) -> None:
    """ValueError unless the network reads latents and prompts alone.

    FLUX Fill, Control and Kontext, editing and image-to-video pipelines give it conditions besides.
    """
    kind, config = kind_of(module), original(module).config
    reads, makes = int(config.in_channels), kind.outputs(config)
    if reads != makes:
        raise ValueError(
            f"this {type_name(module)} reads {reads} channels and makes {makes}: it needs an image "
            "or control beside the latents, which models and refiners here don't give it; "
            "ft.accelerate without a refiner runs its pipeline"
        )
    name = type(pipe).__name__
    if any(part in name for part in _CONDITIONED):
        raise ValueError(
            f"{name} gives its network images beside the latents, which models and refiners here "
            "don't do; ft.accelerate without a refiner runs this pipeline"
        )
