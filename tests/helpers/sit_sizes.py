"""Small sizes of SiT, and inputs to them."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowturbo.models.sit import SiTConfig


def inputs(
    config: SiTConfig, seed: int, n: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """x, t, y, and v for a refiner; the last label is the null class."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, config.channels, config.side, config.side)
    x, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    t = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(config.num_classes, (n,), generator=generator)
    y[-1] = config.null_class
    return (x, t, y, v) if config.reads_velocity else (x, t, y)


SMALL = {
    "patch 2": SiTConfig(hidden=96, depth=3, heads=4, patch=2, side=8, num_classes=10),
    "patch 4": SiTConfig(hidden=32, depth=2, heads=2, patch=4, side=16, num_classes=3),
    "patch 8": SiTConfig(hidden=40, depth=1, heads=5, patch=8, side=16, num_classes=10),
    "head_dim 72": SiTConfig(hidden=144, depth=2, heads=2, patch=2, side=6, num_classes=10),
    "one channel, 9 tokens": SiTConfig(
        hidden=24, depth=2, heads=1, patch=2, side=6, channels=1, num_classes=1
    ),
    "three channels, one token": SiTConfig(
        hidden=24, depth=2, heads=3, patch=2, side=2, channels=3, num_classes=5
    ),
}


def variants(config: SiTConfig) -> dict[str, SiTConfig]:
    return {
        f"{role}, {'learned sigma' if sigma else 'velocity only'}": replace(
            config, reads_velocity=role == "refiner", learned_sigma=sigma
        )
        for role, sigma in itertools.product(("predictor", "refiner"), (True, False))
    }


ALL = {
    f"{size}, {kind}": config
    for size, small in SMALL.items()
    for kind, config in variants(small).items()
}
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
