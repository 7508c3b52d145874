"""Random latents, as they stand in memory and in shards."""

from pathlib import Path

import torch
from torch import Tensor

from flowturbo.data.latents import Latents
from flowturbo.storage.files import save_tensors


def random_latents(
    seed: int, count: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.randn(count, 2, 4, 4, generator=g).to(dtype)
        for name in ("latents", "latents_flipped")
    }
    parts |= {
        name: torch.rand(count, 2, 4, 4, generator=g).to(dtype) for name in ("std", "std_flipped")
    }
    return {**parts, "labels": torch.randint(5, (count,), generator=g)}


def shard(
    path: Path,
    drop: tuple[str, ...] = (),
    change: dict[str, Tensor] | None = None,
    **description: object,
) -> None:
    parts = {name: values for name, values in random_latents(6, 3).items() if name not in drop}
    save_tensors(path, {**parts, **(change or {})}, description)


def latents_of(parts: dict[str, Tensor]) -> Latents:
    others = {name: values for name, values in parts.items() if name not in ("latents", "labels")}
    return Latents(parts["latents"], parts["labels"], **others)  # type: ignore[arg-type]
