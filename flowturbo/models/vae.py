"""Between images and latents: an interface, the Stable Diffusion VAE through diffusers, and plain pixels."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

SD_LATENT_SCALE = 0.18215


@runtime_checkable
class VAE(Protocol):
    """What sampling, training and encoding ask of an autoencoder."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents (N, C, H, W) -> images (N, height, width, 3), uint8."""
        ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images (N, height, width, 3), uint8 -> mean and standard deviation (None: exact) of the latents, (N, C, H, W) float32."""
        ...


class Pixels:
    """Grey images as their own latents: one channel, -1 black, 1 white."""

    def decode(self, latents: Tensor) -> Tensor:
        return to_uint8(latents).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return to_float(images).mean(dim=1, keepdim=True), None


class DiffusersVAE:
    """An AutoencoderKL of diffusers; latents are scaled by its own scaling factor (SD: 0.18215)."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.scale = float(getattr(network.config, "scaling_factor", SD_LATENT_SCALE))

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.network.device, self.network.dtype) / self.scale
        return to_uint8(self.network.decode(latents).sample).permute(0, 2, 3, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = to_float(images).to(self.network.device, self.network.dtype)
        posterior = self.network.encode(pixels).latent_dist
        return self.scale * posterior.mean.float(), self.scale * posterior.std.float()


def load_vae(name: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> VAE:
    """"pixels", or a local folder or hub name of a diffusers AutoencoderKL (safetensors only). ValueError if it can't be had."""
    if name == "pixels":
        return Pixels()
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"vae {str(name)!r} needs diffusers: pip install 'flowturbo[diffusers]' ({error})") from None
    try:
        network = AutoencoderKL.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"vae {str(name)!r} is neither a folder nor a reachable hub name of an AutoencoderKL: {error}"
        ) from error
    return DiffusersVAE(network.to(device).eval().requires_grad_(False))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 to 255 by 127.5 x + 128, cut off: the rounding that the published SiT scores used."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """(N, height, width, 3) uint8 -> (N, 3, height, width) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
