"""A small classifier of the pictures that a model was trained on, whose features take the place of
Inception's: Fréchet and kernel distances are measured in them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import natural, positive
from ..data.latents import Latents
from ..runtime.modes import own_modes, without_autocast
from ..storage.files import save_tensors
from ..storage.resume import resumed_tensors
from .digit_classifier import fit, undrawn

FEATURES = 64
"""Few enough that some hundred held-out pictures determine their covariance."""
WIDTH, MOST, SMALLEST = 32, 128, 4
"""Channels at full size, doubled at each halving up to MOST; the side at which halving ends."""
RECIPE = "1"
"""Changed with the network or its training, so that no stored classifier of another is taken."""


class PictureClassifier(nn.Module):
    """Pictures (N, C, H, W) in [-1, 1] -> logits (N, K), by way of FEATURES features.

    mirrored: whether a picture and its mirror image are equal for it, because the data holds both:
        features and logits are then the means over the two.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, mirrored: bool) -> None:
        super().__init__()
        channels, *sides = shape
        layers: list[nn.Module] = [*_block(channels, WIDTH, 1)]
        width = WIDTH
        for _ in range(max(0, math.ceil(math.log2(min(sides) / SMALLEST)))):
            layers += _block(width, min(2 * width, MOST), 2)
            width = min(2 * width, MOST)
        self.trunk = nn.Sequential(*layers)
        self.features = nn.Linear(width, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)
        self.mirrored = mirrored

    def embed(self, x: Tensor) -> Tensor:
        return F.gelu(self.features(self.trunk(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))

    @torch.no_grad()
    def read(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (N, C, H, W) -> features (N, FEATURES), classes (N,), on the CPU.

        Latents are clipped to [-1, 1], as decoding does.
        """
        features = []
        with without_autocast(torch.device("cpu")):
            for x in latents.detach().split(_ROWS):
                x = x.cpu().float().clamp(-1, 1)
                own = self.embed(x)
                features.append((own + self.embed(x.flip(3))) / 2 if self.mirrored else own)
            joined = torch.cat(features)
            return joined, self.head(joined).argmax(dim=1)

    def accuracy(self, data: Latents) -> float:
        """The share of pictures that are classified as their label."""
        return float((self.read(data.mean)[1] == data.labels).double().mean())


_ROWS = 256  # a larger batch would not be faster, and 10,000 pictures at once take 2 GB


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False)
    return [convolution, nn.GroupNorm(8, outputs), nn.GELU()]


@own_modes()
def train_picture_classifier(
    data: Latents,
    *,
    steps: int = 1500,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    progress: bool = False,
) -> PictureClassifier:
    """Train a classifier on turned, shifted, scaled and noisy copies of the pictures, on the CPU.

    data: pixels in [-1, 1] as latents (C, H, W); mirrored pictures are taken where it has them.
    Classes are drawn with the root of their size, so that the small ones count. The result depends
    on the data, the arguments, and the machine's rounding. The global random number generators are
    left untouched.
    """
    positive("steps", steps)
    generator = torch.Generator("cpu").manual_seed(natural("seed", seed))
    mirrored = data.latents_flipped is not None
    network = undrawn(lambda: PictureClassifier(data.shape, data.num_classes, mirrored))
    weights = data.labels.bincount(minlength=data.num_classes).double().rsqrt()[data.labels]

    def batch() -> tuple[Tensor, Tensor]:
        rows = weights.multinomial(batch_size, replacement=True, generator=generator)
        x = data.mean[rows].float()
        if data.latents_flipped is not None:
            flip = _uniform((batch_size, 1, 1, 1), generator) < 0.5
            x = torch.where(flip, data.latents_flipped[rows].float(), x)
        return _augmented(x, generator), data.labels[rows]

    positive("batch_size", batch_size)
    bar = tqdm(total=steps, disable=None if progress else True, unit="step", desc="classifier")
    with bar:
        return fit(network, batch, steps, lr, generator, smoothing=0.1, advance=bar.update)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), whatever the caller's default dtype and device are."""
    return torch.rand(
        tuple(shape), generator=generator, dtype=torch.float32, device=generator.device
    )


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (N, C, H, W), each turned, shifted and scaled a little, with other contrast, and noise."""
    turn, right, down, scale, contrast = 2 * _uniform((5, len(x)), generator) - 1
    turn, scale = 0.26 * turn, 1 + 0.2 * scale  # 15 degrees, a fifth
    cos, sin = turn.cos() * scale, turn.sin() * scale
    rows = torch.stack([cos, -sin, 0.2 * right, sin, cos, 0.2 * down], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return moved * (1 + 0.2 * contrast).view(-1, 1, 1, 1) + 0.05 * noise


def data_digest(data: Latents) -> str:
    """SHA-256 of pictures and labels, as hexadecimal digits, however they are stored."""
    hashed = hashlib.sha256()
    for tensor in (data.mean, data.labels, data.latents_flipped):
        if tensor is not None:
            hashed.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def kept_classifier(path: Path, data: Latents, steps: int) -> PictureClassifier:
    """The classifier in a file, or a new one, which is then stored there.

    ValueError for a file with one of other data or another recipe.
    """
    identity: dict[str, Any] = {"recipe": RECIPE, "steps": steps, "data": data_digest(data)}
    mirrored = data.latents_flipped is not None
    if stored := resumed_tensors(path, identity):
        network = undrawn(lambda: PictureClassifier(data.shape, data.num_classes, mirrored))
        network.load_state_dict(stored)
        return network.requires_grad_(False).eval()
    network = train_picture_classifier(data, steps=steps, progress=True)
    save_tensors(path, dict(network.state_dict()), identity)
    return network
