"""Autoencoders whose latents are normalised channel by channel, of Qwen-Image, Wan and FLUX.2.

Each scales and decodes as its pipeline does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .not_finite import Noted
from .vae import DECODE_BYTES, Decoder, decode_in_slices, to_float, to_uint8


class VideoVAE(Decoder):
    """AutoencoderKLQwenImage, which reads images as videos of one frame, and AutoencoderKLWan.

    Latents z become (z - shift) / scale, with latents_mean and latents_std. Those of images are
    (N, C, H, W), those of videos (N, C, T, H, W), where the first frame stands alone and every
    further latent frame for `frames_per_latent` of them.
    """

    def __init__(self, network: Any, video: bool) -> None:
        config = network.config
        self.network, self.video = network, video
        self.channels = int(config.z_dim)
        self.shift, self.scale = list(config.latents_mean), list(config.latents_std)
        self.frames_per_latent = 2 ** sum(config.temperal_downsample)
        patch = config.get("patch_size") or 1
        self.factor = int(
            config.get("scale_factor_spatial") or patch * 2 ** (len(config.dim_mult) - 1)
        )

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.network.dtype)

    def decode_noting(self, latents: Tensor) -> tuple[Tensor, Noted]:
        """Of images (N, height, width, 3), or of videos (N, frames, height, width, 3), uint8."""
        _check(latents, self.channels, 5 if self.video else 4)
        z = latents.to(self.network.device, self.network.dtype)
        z = z if self.video else z.unsqueeze(2)
        mean, std = self._statistics(z)
        size = 3 * self.factor**2 * 64 * z[0, 0].numel() * z.itemsize * self.frames_per_latent
        return decode_in_slices(self._frames, latents, z * std + mean, DECODE_BYTES // size)

    def _frames(self, z: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.network.decode(z).sample
        frames = to_uint8(pixels).permute(0, 2, 3, 4, 1)
        return frames if self.video else frames[:, 0], pixels

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of images (N, height, width, 3), or of videos (N, frames, height, width, 3), uint8."""
        single = images.ndim == 4
        pixels = torch.stack([to_float(video[None] if single else video) for video in images])
        pixels = pixels.transpose(1, 2).to(self.network.device, self.network.dtype)
        posterior = self.network.encode(pixels).latent_dist
        mean, std = self._statistics(posterior.mean.float())
        scaled = (posterior.mean.float() - mean) / std, posterior.std.float() / std
        return scaled if self.video else (scaled[0][:, :, 0], scaled[1][:, :, 0])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Filled on the device: a copy from the host can't be captured.
        parts = []
        for numbers in (self.shift, self.scale):
            part = like.new_empty(len(numbers), 1, 1, 1)
            for row, number in zip(part, numbers, strict=True):
                row.fill_(number)
            parts.append(part)
        return parts[0], parts[1]


class Flux2VAE(Decoder):
    """AutoencoderKLFlux2: its latents in patches of 2 x 2, normalised by its batch norm's figures.

    They are (N, 4 C, H/2, W/2) for latents (N, C, H, W) of the network itself.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.channels = 4 * int(network.config.latent_channels)
        self.factor = 2 ** len(network.config.block_out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.network.dtype)

    def decode_noting(self, latents: Tensor) -> tuple[Tensor, Noted]:
        _check(latents, self.channels, 4)
        mean, std = self._statistics()
        z = latents.to(self.network.device).float() * std + mean
        z = z.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        z = z.to(self.network.dtype)
        size = 3 * 512 * z[0, 0].numel() * self.factor**2 // 4 * z.itemsize
        return decode_in_slices(self._images, latents, z, DECODE_BYTES // size)

    def _images(self, z: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.network.decode(z).sample
        return to_uint8(pixels).permute(0, 2, 3, 1).contiguous(), pixels

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, std = self._statistics()
        pixels = to_float(images.to(self.network.device)).to(self.network.dtype)
        posterior = self.network.encode(pixels).latent_dist
        center, spread = (
            part.float().unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
            .flatten(1, 3)
            for part in (posterior.mean, posterior.std)
        )  # fmt: skip
        return (center - mean) / std, spread / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self.network.bn
        mean = norm.running_mean.float().view(-1, 1, 1)
        variance = norm.running_var.float().view(-1, 1, 1)
        return mean, (variance + self.network.config.batch_norm_eps).sqrt()


def _check(latents: Tensor, channels: int, axes: int) -> None:
    if latents.ndim != axes or latents.shape[1] != channels:
        shape = f"(N, {channels}, {'T, ' * (axes == 5)}H, W)"
        raise ValueError(
            f"latents must have shape {shape} for this vae, got {tuple(latents.shape)}"
        )
