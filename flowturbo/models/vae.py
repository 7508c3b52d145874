"""Autoencoders between images and latents.

An interface, and two implementations: the autoencoders of diffusers, and plain pixels.
"""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from flowturbo_kernels import image_bytes, unscale_latents

from ..storage.files import CheckpointError, user_path
from .convolution_search import convolution_search
from .diffusers_io import ask_hub, is_path, read_pretrained
from .finite_weights import check_finite
from .not_finite import LATENTS, PIXELS, Noted, checked, note, nothing_noted
from .vae_fusion import fuse

SD_LATENT_SCALE = 0.18215
DECODE_BYTES = 2 << 30
"""The most memory that decoding takes at once. Larger batches are decoded in slices of this size,
which keep any device busy, so that sampling does not run out of memory at its end.
"""


@runtime_checkable
class VAE(Protocol):
    """The interface of an autoencoder.

    factor: pixels of an image side per unit of a latent side.
    """

    factor: int

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) -> images (N, height, width, 3), uint8."""
        ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (N, height, width, 3), uint8 -> mean and standard deviation of the latents.

        Both are (N, C, H, W) float32; the second is None if the encoding is exact.
        """
        ...


class Decoder(ABC):
    """An autoencoder that notes which of its images are not finite."""

    @abstractmethod
    def decode_noting(self, latents: Tensor) -> tuple[Tensor, Noted]:
        """`decode`, with what was noted of each image, and without waiting for the device."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In which it computes."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) -> images (N, height, width, 3), uint8; NotFiniteError for NaN."""
        images, noted = self.decode_noting(latents)
        return checked(noted, images, (self.dtype, self.dtype))


def decode_noting(vae: VAE, latents: Tensor) -> tuple[Tensor, Noted]:
    """Decode by any autoencoder -> images, and what was noted of each.

    Of one that is not ours, only the latents can be checked.
    """
    # Somebody's own decode, of a subclass or set on this object, is called.
    ours = isinstance(vae, Decoder) and getattr(vae.decode, "__func__", None) is Decoder.decode
    if ours:
        return cast(Decoder, vae).decode_noting(latents)
    # Its images may be a buffer that it uses again.
    return vae.decode(latents).clone(), noted_twice(latents)


def noted_twice(latents: Tensor) -> Noted:
    """What is noted where the pixels are the latents, or can't be looked at."""
    noted = nothing_noted(len(latents), latents.device)
    for part in (PIXELS, LATENTS):
        note(noted, part, latents)
    return noted


def decode_in_slices(
    decode: Callable[[Tensor], tuple[Tensor, Tensor]], latents: Tensor, z: Tensor, size: int
) -> tuple[Tensor, Noted]:
    """z (N, ...), made of the latents, decoded `size` at once -> images, what was noted.

    decode: z (n, ...) -> images (n, ...) uint8, and the pixels that they were made of.
    """
    noted, done = nothing_noted(len(z), z.device), 0
    note(noted, LATENTS, latents.to(z.device))

    def noting(part: Tensor) -> Tensor:
        nonlocal done
        images, pixels = decode(part)
        note(noted, PIXELS, pixels, done)
        done += len(part)
        return images

    return in_slices(noting, z, max(1, size)), noted


PIXEL_CHANNELS = {"pixels": 1, "rgb": 3}
"""The names of autoencoders whose latents are pixels, with the channels of these."""


class Pixels(Decoder):
    """Images as their own latents, from -1 to 1: grey in one channel, or red, green and blue."""

    scale, shift, factor = 1.0, 0.0, 1
    dtype = torch.float32

    def __init__(self, channels: int = 1) -> None:
        if channels not in PIXEL_CHANNELS.values():
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.channels = channels

    def decode_noting(self, latents: Tensor) -> tuple[Tensor, Noted]:
        images = to_uint8(latents).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        return images.contiguous(), noted_twice(latents)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = to_float(images)
        return (pixels.mean(dim=1, keepdim=True) if self.channels == 1 else pixels), None


class DiffusersVAE(Decoder):
    """An AutoencoderKL or AutoencoderTiny of diffusers.

    Its latents z become (z - shift) * scale, with the factors of its configuration: 0 and 0.18215
    for SD. Tiny autoencoders (TAESD) read and write latents that are scaled already: 0 and 1.
    """

    def __init__(self, network: Any) -> None:
        config = network.config
        if any(getattr(config, name, None) is not None for name in ("latents_mean", "latents_std")):
            raise ValueError(
                "a VAE with latents_mean and latents_std in its configuration is not supported: "
                "only scale and shift are"
            )
        self.network = network
        self.scale = float(getattr(config, "scaling_factor", SD_LATENT_SCALE))
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.network.dtype)

    def decode_noting(self, latents: Tensor) -> tuple[Tensor, Noted]:
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents must have shape (N, {self.channels}, H, W) for this vae, got "
                f"{tuple(latents.shape)}"
            )
        numbers = latents if latents.is_floating_point() else latents.float()
        z = unscale_latents(
            numbers.to(self.network.device), self.scale, self.shift, self.network.dtype
        )
        size = DECODE_BYTES // self._decode_bytes(*z.shape[2:])
        return decode_in_slices(self._images, latents, z, size)

    def _images(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with convolution_search(self.network, z):
            images = self.network.decode(z).sample
        return image_bytes(images if images.dtype.itemsize <= 4 else images.float()), images

    def _decode_bytes(self, height: int, width: int) -> int:
        """About the bytes that decoding one image takes.

        Input, normalised input and output of the widest layer at full size. height, width: of the
        latent.
        """
        widest = max(self.network.config.block_out_channels[:2])
        return int(3 * widest * height * width * self.factor**2 * self.network.dtype.itemsize)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images must have sides that are multiples of {self.factor} for this vae, got "
                f"{height} x {width}"
            )
        pixels = to_float(images.to(self.network.device)).to(self.network.dtype)
        encoded = self.network.encode(pixels.contiguous(memory_format=torch.channels_last))
        if not hasattr(encoded, "latent_dist"):  # tiny autoencoders are deterministic
            return self.scale * (encoded.latents.float() - self.shift), None
        posterior = encoded.latent_dist
        return self.scale * (
            posterior.mean.float() - self.shift
        ), self.scale * posterior.std.float()


def in_slices(run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """run(x) in slices of at most `size` rows; half as many whenever memory runs out.

    x: (N, ...). The results are concatenated along the first axis.
    """
    parts: list[Tensor] = []
    while (start := sum(map(len, parts))) < len(x):
        try:
            parts.append(run(x[start : start + size]))
        except torch.OutOfMemoryError:
            # A failed capture can't continue: the cache of captures frees memory and tries again.
            if size == 1 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                raise
            size = (min(size, len(x) - start) + 1) // 2
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def load_vae(name: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> VAE:
    """An autoencoder: "pixels" (grey), "rgb", or one of diffusers, read from safetensors only.

    name: "pixels" or "rgb"; the folder of an AutoencoderKL or AutoencoderTiny, or of a pipeline
        with a sub-folder vae; or a hub name, "org/name" or "org/name/folder".
    dtype: float32 is used instead on the CPU, and where the configuration says that float16
        overflows. float32 convolutions run in TF32 on a GPU, as is torch's default
        (torch.backends.cudnn.allow_tf32).
    Raises ValueError if it can't be found, and CheckpointError, a ValueError too, if its files are
    damaged or belong to another model.
    """
    if isinstance(name, str) and name in PIXEL_CHANNELS:
        return Pixels(PIXEL_CHANNELS[name])
    try:
        from diffusers import AutoencoderKL, AutoencoderTiny
    except ImportError as error:
        raise ValueError(
            f"vae {str(name)!r} needs diffusers: pip install 'flowturbo[diffusers]' ({error})"
        ) from None
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    if is_path(name):
        network = read_pretrained(
            "vae", kinds, name, str(_vae_folder(user_path(name))), local_files_only=True
        )
    else:
        network = _from_hub(kinds, str(name))
    too_narrow = device.type == "cpu" and dtype.itemsize < 4
    overflows = dtype == torch.float16 and getattr(network.config, "force_upcast", False)
    # nn.Module.to itself: diffusers' method warns of parts that must stay in float32 even if there
    # are none.
    dtype = torch.float32 if too_narrow or overflows else dtype
    check_finite(f"vae {str(name)!r}", network.state_dict(), dtype)
    nn.Module.to(network, device, dtype)
    fuse(network)
    return DiffusersVAE(network.eval().requires_grad_(False))


def check_vae(vae: Any, channels: int) -> None:
    """Raise unless a model whose latents have so many channels can use this autoencoder.

    TypeError for what is none, ValueError for one of other latents. An object that does not say how
    many channels it has (`channels`) is taken.
    """
    if vae is None:
        return
    if hasattr(vae, "config") and not isinstance(vae, VAE):
        raise TypeError(
            f"vae must have factor, decode and encode, got a {type(vae).__name__}: give its "
            "folder, or DiffusersVAE of it (flowturbo.models.vae)"
        )
    if not callable(getattr(vae, "decode", None)):
        raise TypeError(
            "vae must be a folder, a hub name, 'pixels', 'rgb' or an object with decode and "
            f"encode, got {type(vae).__name__}"
        )
    _check_channels(getattr(vae, "channels", None), channels, "vae")


def check_named_vae(name: str | os.PathLike[str], channels: int) -> None:
    """Raise ValueError if a folder, "pixels" or "rgb" has latents of another number of channels.

    Nothing is loaded: what its configuration says counts, and other names may be right.
    """
    own = PIXEL_CHANNELS.get(str(name)) or _said_channels(Path(name).expanduser())
    _check_channels(own, channels, f"vae {str(name)!r}")


def _said_channels(path: Path) -> int | None:
    """The latent channels in the configuration of a VAE's or a pipeline's folder, if they are."""
    for file in (path / "config.json", path / "vae" / "config.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            config = json.loads(file.read_text(encoding="utf-8"))
            return config.get("latent_channels") if isinstance(config, dict) else None
    return None


def _check_channels(own: Any, channels: int, what: str) -> None:
    if isinstance(own, int) and own != channels:
        raise ValueError(
            f"{what} does not fit the model: its latents have {own} channels, the model's "
            f"{channels}"
        )


def _vae_folder(path: Path) -> Path:
    """The folder that holds a VAE's configuration and weights as safetensors."""
    if not path.is_dir():
        absent = (
            "does not exist (a name is looked for on the hub if it is like 'org/name' and no "
            "folder org stands here)"
        )
        what = "is a file, not a folder" if path.exists() else absent
        raise ValueError(
            "vae must be 'pixels', 'rgb', the folder of an AutoencoderKL or a hub name, but "
            f"{path} {what}"
        )
    folder = (
        path / "vae" if not (path / "config.json").is_file() and (path / "vae").is_dir() else path
    )
    if not (folder / "config.json").is_file():
        raise ValueError(
            "vae must be the folder of an AutoencoderKL, as diffusers' save_pretrained writes "
            f"it, but {path} has no config.json"
        )
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file() and not weights.with_suffix(".safetensors.index.json").is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        if not pickled:
            raise ValueError(f"vae {path} has no {weights.name}")
        raise ValueError(
            f"vae {path} has no {weights.name}, but {pickled[0]}, a pickle, which is not read; if "
            "you trust it, convert it once: "
            f"AutoencoderKL.from_pretrained({str(folder)!r}, "
            f"use_safetensors=False).save_pretrained({str(folder)!r})"
        )
    return folder


def _from_hub(kinds: Mapping[str, Any], name: str) -> Any:
    """An autoencoder of the hub; one that was downloaded before needs no network."""
    parts = name.split("/")
    repository, subfolder = "/".join(parts[:2]), "/".join(parts[2:]) or None
    with contextlib.suppress(CheckpointError):
        return read_pretrained(
            "vae", kinds, name, repository, subfolder=subfolder, local_files_only=True
        )
    ask_hub("vae", name, repository)
    return read_pretrained("vae", kinds, name, repository, subfolder=subfolder)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> 0 to 255, by 127.5 x + 128, clamped.

    The published SiT scores were computed with this rounding.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """(N, height, width, 3) uint8 -> (N, 3, height, width) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
