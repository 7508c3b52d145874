"""From the end of one stage to the start of the next: images enlarged, noise kept and added.

Where stages meet, x = t * denoised + (1 - t) * noise. The denoised estimate is enlarged, by any
method. The noise estimate becomes the low frequencies of the larger noise, and the image's own
noise its high frequencies. Both are white, so their sum is, with the variance that the next stage
expects at every frequency. RALU (arXiv 2507.08422) adds correlated noise for the same end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive
from ..models.vae import VAE
from ..runtime.rng import later_noise
from ..solver.path import on_path
from ..solver.stages import matched_level

_LANE = 2**61  # of random numbers, which no stage uses
Size = tuple[int, int]
Enlarge = (
    Literal["latents", "pixels"]
    | Callable[[Tensor], Tensor]
    | tuple[Literal["latents"], Callable[[Tensor, Size], Tensor]]
)
Enlarger = Callable[[Tensor, Size], Tensor]
"""Latents (n, C, h, w) and a size (H, W) -> latents (n, C, H, W)."""


def enlarger(enlarge: Enlarge, vae: VAE | None, stages: int) -> Enlarger:
    """The enlarging that `sample`'s argument of this name asks for.

    stages: how many there are; without a second one nothing is enlarged.
    Raises ValueError or TypeError for anything else, and for pixels without a vae.
    """
    if enlarge == "latents":
        return bicubic
    if isinstance(enlarge, tuple):
        if len(enlarge) != 2 or enlarge[0] != "latents" or not callable(enlarge[1]):
            raise ValueError(f"enlarge must be ('latents', a callable) if a tuple, got {enlarge!r}")
        return functools.partial(_checked, enlarge[1])
    if enlarge != "pixels" and not callable(enlarge):
        raise TypeError(
            "enlarge must be 'latents', 'pixels', a callable on images, or ('latents', a callable "
            f"on latents), got {enlarge!r}"
        )
    if vae is None and stages == 1:
        return bicubic
    if vae is None:
        raise ValueError(
            "enlarge in pixels needs a model with a vae; without one give 'latents' or "
            "('latents', a callable)"
        )
    return functools.partial(_in_pixels, vae, None if isinstance(enlarge, str) else enlarge)


def bicubic(x: Tensor, size: Size) -> Tensor:
    """x (n, C, h, w) -> (n, C, *size), by cubic interpolation."""
    same = tuple(x.shape[2:]) == size
    return x if same else F.interpolate(x, size, mode="bicubic", align_corners=False)


def _checked(enlarge: Callable[[Tensor, Size], Tensor], x: Tensor, size: Size) -> Tensor:
    result = enlarge(x, size)
    expected = (*x.shape[:2], *size)
    if not isinstance(result, Tensor) or tuple(result.shape) != expected:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"enlarge must return latents of shape {expected}, got {got}")
    return result.to(x)


def _in_pixels(
    vae: VAE, network: Callable[[Tensor], Tensor] | None, x: Tensor, size: Size
) -> Tensor:
    """Decode, enlarge and encode. network: images (n, 3, h, w) in [0, 1] -> larger ones."""
    images = vae.decode(x).permute(0, 3, 1, 2).float() / 255
    if network is not None:
        images = _larger(network, images).to(images)
    pixels = (size[0] * vae.factor, size[1] * vae.factor)
    if tuple(images.shape[2:]) != pixels:  # a network has a factor of its own
        images = F.interpolate(images, pixels, mode="bicubic", align_corners=False, antialias=True)
    whole = (255 * images.clamp(0, 1)).round().to(torch.uint8)
    return vae.encode(whole.permute(0, 2, 3, 1))[0].to(x)


def _larger(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The images that a network makes of these, in its own dtype."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    larger: Any = network(images if parameter is None else images.to(parameter))
    n = len(images)
    if not isinstance(larger, Tensor) or larger.ndim != 4 or tuple(larger.shape[:2]) != (n, 3):
        got = tuple(larger.shape) if isinstance(larger, Tensor) else type(larger).__name__
        raise ValueError(f"enlarge must return images of shape ({n}, 3, height, width), got {got}")
    return larger


def coarse_noise(noise: Tensor, size: Size) -> Tensor:
    """The low frequencies of white noise (N, C, H, W), as white noise (N, C, *size).

    So small and large images from one seed are of the same composition.
    """
    if tuple(noise.shape[2:]) == size:
        return noise
    rows, columns = _bases(noise, size)
    return (rows.T @ noise.double() @ columns).to(noise.dtype)


def with_low_frequencies(noise: Tensor, low: Tensor) -> Tensor:
    """White noise (N, C, H, W) with the low frequencies of other white noise, (N, C, h, w)."""
    if noise.shape == low.shape:
        return low
    rows, columns = _bases(noise, (low.shape[2], low.shape[3]))
    wide = noise.double()
    change = low.double() - rows.T @ wide @ columns
    return (wide + rows @ change @ columns.T).to(noise.dtype)


def resized_noise(noise: Tensor, size: int | Size) -> Tensor:
    """White noise of another size, (N, C, *size), from which a model makes images of the same
    composition.

    The frequencies that both sizes have are those of `noise`. Higher ones are new, and a function
    of the image's own noise alone, to the last bit.
    noise: (N, C, h, w), floating point. size: (H, W), or one number for both.
    Raises ValueError or TypeError for others.
    """
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size must be a number or two, got {size!r}")
    H, W = (positive("size", side) for side in pair)
    if not isinstance(noise, Tensor) or noise.ndim != 4 or not noise.is_floating_point():
        raise ValueError("noise must be a floating-point tensor (images, channels, height, width)")
    low = coarse_noise(noise, (min(H, noise.shape[2]), min(W, noise.shape[3])))
    if tuple(low.shape[2:]) == (H, W):
        return low
    return with_low_frequencies(later_noise(noise, (noise.shape[1], H, W), _LANE).to(noise), low)


def _bases(noise: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """In float64: a few rows in float32 would make the result depend on the number of images."""
    _, _, H, W = noise.shape
    return tuple(
        torch.from_numpy(_enlarging(large, small)).to(noise.device)
        for large, small in zip((H, W), size, strict=True)
    )  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _enlarging(large: int, small: int) -> np.ndarray:
    """(large, small) with orthonormal columns: cosines of the same frequencies at both sizes."""
    return _cosines(large)[:small].T @ _cosines(small)


def _cosines(count: int) -> np.ndarray:
    """The orthonormal discrete cosine transform (DCT-II), (frequency, place)."""
    frequency, place = np.ogrid[:count, :count]
    cosines = np.sqrt(2 / count) * np.cos(np.pi * frequency * (place + 0.5) / count)
    cosines[0] /= np.sqrt(2)
    return cosines


def kept_noise(end: float, start: float, ratio: float) -> float:
    """The share of the noise estimate that the low frequencies keep, 0 to 1; the rest is new.

    end: the noise level at which a stage stopped. start: that at which the next one takes over, at
    sides `ratio` times as long.
    If the levels match all of it is kept, and none if the stage went to noise level 0.
    """
    level = matched_level(start, ratio)
    share = end / (1 - end) * (1 - level) / level
    return 1.0 if share > 1 - 1e-12 else share


def taken_over(
    ends: Tensor, noise: Tensor, enlarge: Enlarger, end: float, start: float, lane: int
) -> Tensor:
    """Where the next stage starts, (n, C, H, W).

    ends: (n, 2C, h, w), what the last stage returned: see `run.both_ends`.
    noise: (n, C, H, W), the image's own at the new size.
    end, start: noise levels, at which the last stage stopped and the next one takes over.
    lane: the number of the stage, for the new noise, which is a function of (noise, lane).
    """
    estimate, low = ends.chunk(2, dim=1)
    (h, w), (H, W) = low.shape[2:], noise.shape[2:]
    kept = kept_noise(end, start, math.sqrt(H * W / (h * w)))
    if kept < 1:
        new = later_noise(noise, tuple(low.shape[1:]), lane).to(low)
        low = kept * low + math.sqrt(1 - kept**2) * new
    return on_path(enlarge(estimate, (H, W)), with_low_frequencies(noise, low), 1 - start)
