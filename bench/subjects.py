"""What everyone samples: the same networks with random weights, noise and labels, on one device."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from decoder import Autoencoder
from torch import Tensor

from flowturbo.models.random_weights import filled
from flowturbo.models.sit import SIT_CONFIGS, SiT, SiTConfig
from flowturbo.runtime import rng

GUIDANCE = 1.5
DEPTH, DECODER = "FLOWTURBO_BENCH_DEPTH", "FLOWTURBO_BENCH_DECODER"
"""In the environment, for trial runs: the predictor's number of blocks, and "small" for a decoder
of a hundredth of the work.
"""


@dataclass(frozen=True)
class Subject:
    """What is sampled: a predictor, its refiner and an autoencoder with random weights, on a
    device, a batch at a time.

    decoder: "full" or "small". noise (batch, C, H, W) float32 and labels (batch,) int64, on the
        device, for everyone.
    """

    predictor: SiT
    refiner: SiT
    vae: Autoencoder
    device: torch.device
    dtype: torch.dtype
    batch: int
    decode: bool
    decoder: str
    noise: Tensor = field(repr=False, compare=False)
    labels: Tensor = field(repr=False, compare=False)
    guidance: float = GUIDANCE

    @property
    def output(self) -> Any:
        return "uint8" if self.decode else "latents"

    @property
    def about(self) -> dict[str, Any]:
        """What a table must say where it is not the published model's: its depth, and which decoder
        it has.
        """
        return {"depth": self.predictor.config.depth, "decoder": self.decoder}


@functools.lru_cache(maxsize=1)
def networks(
    size: int, cuda: bool, depth: int | None = None, decoder: str = "full"
) -> tuple[SiT, SiT, Autoencoder]:
    """SiT-XL/2 with SD's decoder on a GPU, a small one elsewhere, in bfloat16 or float32. depth:
    None: what that has.
    """
    device = torch.device("cuda" if cuda else "cpu")
    config = replace(SIT_CONFIGS["SiT-XL/2"], side=size // 8)
    if not cuda:
        config = SiTConfig(hidden=96, depth=2, heads=4, patch=2, side=size // 8)
    if depth is not None:
        config = replace(config, depth=depth)
    torch.manual_seed(0)
    with torch.device(device):
        vae = Autoencoder() if decoder == "full" else Autoencoder((16, 16, 32, 32), 0, 8)
    dtype = torch.bfloat16 if cuda else torch.float32
    nets = (
        open_gates(filled(config, device, 0)),
        open_gates(filled(config.refiner(), device, 1)),
        vae.requires_grad_(False).eval(),
    )
    return tuple(net.to(dtype) for net in nets)  # type: ignore[return-value]


def open_gates(network: SiT) -> SiT:
    """Every gate about one, in place: with random weights it is about nought, the blocks change the
    velocity by 2 % in all, and latents would hardly tell a wrong block from a right one.
    """
    for block in network.blocks:
        _, _, gate_msa, _, _, gate_mlp = block.adaLN_modulation[1].bias.chunk(6)
        gate_msa += 1
        gate_mlp += 1
    return network


def subject(size: int, batch: int, decode: bool) -> Subject:
    """As the environment has it. ValueError for a depth or decoder there that is none."""
    cuda = torch.cuda.is_available()
    decoder = _decoder(cuda)
    nets = networks(size, cuda, depth(), decoder)
    weight = nets[0].pos_embed
    config = nets[0].config
    noise = rng.noise((config.channels, config.side, config.side), 0, range(batch)).to(
        weight.device
    )
    labels = torch.arange(batch, device=weight.device) % config.num_classes
    return Subject(*nets, weight.device, weight.dtype, batch, decode, decoder, noise, labels)


def depth() -> int | None:
    given = os.environ.get(DEPTH)
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{DEPTH} must be a number of blocks, at least 1, got {given!r}")
    return int(given)


def _decoder(cuda: bool) -> str:
    """Elsewhere than on a GPU the small one is all there is."""
    given = os.environ.get(DECODER) or "full"
    if given not in ("full", "small"):
        raise ValueError(f"{DECODER} must be 'full' or 'small', got {given!r}")
    return given if cuda else "small"
