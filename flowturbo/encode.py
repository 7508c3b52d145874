"""Images to latents, once, for all trainings: shards of a VAE's posteriors, and of those of the mirrored images."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .checks import positive
from .files import CheckpointError, load_tensors, save_tensors
from .images import scan, square
from .models import choose_device
from .models.vae import VAE, load_vae


@dataclass(frozen=True)
class Encode:
    """Settings of an encoding.

    source: a folder of images with a sub-folder a class; or an .npz of images (N, height, width, 3) uint8 in "arr_0", with their
        labels in "labels" or "arr_1" (without: all of class 0), which is held in memory.
    out: folder for the shards. One that holds shards of the same encoding is gone on with.
    vae: as for `load`. image_size: side of the square that images are cropped to.
    flips: encode the mirrored images too. shard_size: images a shard. dtype: of the stored latents.
    """

    source: Path
    out: Path
    vae: str = "stabilityai/sd-vae-ft-ema"
    image_size: int = 256
    batch_size: int = 32
    flips: bool = True
    shard_size: int = 4096
    dtype: Literal["float16", "float32"] = "float16"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("source", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("image_size", "batch_size", "shard_size"):
            positive(name, getattr(self, name))
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")


_DTYPES = {"float16": torch.float16, "float32": torch.float32}
FORMAT = 1


class _Source(Protocol):
    """Images to encode, by number."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def names(self) -> list[str]:
        """What an image is known by when an encoding goes on."""
        ...

    @property
    def classes(self) -> list[str] | None: ...

    def read(self, indices: Sequence[int], size: int) -> np.ndarray:
        """(N, size, size, 3) uint8."""
        ...


def encode(settings: Encode) -> Path:
    """Write the shards that are not there yet; returns their folder, for load_data.

    Shard k is latents-0000k-of-0000n.safetensors, with latents, std (unless the VAE is exact), labels and, with flips,
    latents_flipped and std_flipped: latents (N, C, H, W) as a model sees them, labels (N,) int64. Its description says which
    images and settings it was made from. Shards appear whole or not at all, so that a stopped run can be started again; for one
    batch_size and device they hold the same values as those of a run that was not stopped.
    """
    device = choose_device(settings.device)
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"out must be a folder, but {settings.out} is a file")
    source = _open(settings.source, settings.out)
    vae = load_vae(settings.vae, device, torch.float32)
    wanted = _plan(settings, source, vae)
    there = _there(settings.out, wanted)
    settings.out.mkdir(parents=True, exist_ok=True)
    for torn in settings.out.glob(".latents-*.tmp"):  # what a killed run was writing
        torn.unlink()
    with tqdm(total=len(source.labels), disable=None, unit="image") as bar:
        for name, description in wanted.items():
            images = _images(description["shard"], settings.shard_size, len(source.labels))
            if name not in there:
                save_tensors(settings.out / name, _encoded(source, images, vae, settings, bar), description)
            else:
                bar.update(len(images))
    return settings.out


def _images(shard: int, shard_size: int, count: int) -> range:
    return range(shard * shard_size, min((shard + 1) * shard_size, count))


def _plan(settings: Encode, source: _Source, vae: VAE) -> dict[str, dict[str, Any]]:
    """File names of all shards, with their descriptions."""
    count = len(source.labels)
    shards = -(-count // settings.shard_size)
    shared = {
        "kind": "latents",
        "format": FORMAT,
        # What decides the values. batch_size and device touch their last bits alone.
        "settings": {
            "vae": settings.vae,
            "scale": getattr(vae, "scale", 1.0),
            "shift": getattr(vae, "shift", 0.0),
            "image_size": settings.image_size,
            "flips": settings.flips,
            "shard_size": settings.shard_size,
            "dtype": settings.dtype,
            "classes": source.classes,
        },
        "num_classes": len(source.classes) if source.classes else int(source.labels.max()) + 1,
        "shards": shards,
    }
    wanted = {}
    for k in range(shards):
        images = _images(k, settings.shard_size, count)
        known = "\n".join(f"{source.labels[i]} {source.names[i]}" for i in images)
        digest = hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()
        wanted[f"latents-{k:05d}-of-{shards:05d}.safetensors"] = {**shared, "shard": k, "images": digest}
    return json.loads(json.dumps(wanted))


def _there(out: Path, wanted: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The wanted shards that are there and whole. ValueError if the folder holds any others, which must not be mixed with these."""
    there = set()
    for path in sorted(out.glob("[!.]*.safetensors")):
        if path.name not in wanted:
            raise ValueError(f"out {out} holds {path.name}, which is none of the {len(wanted)} shards of these settings: {_CURE}")
        try:
            _, description = load_tensors(path)
        except CheckpointError:
            continue  # damaged: made again
        if description != wanted[path.name]:
            raise ValueError(f"out {out}: {path.name} was made {_difference(description or {}, wanted[path.name])}: {_CURE}")
        there.add(path.name)
    return there


_CURE = "choose another folder, or delete its shards"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before.get("settings"), now["settings"]
    if not isinstance(old, dict):
        return "by something else"
    changed = [k for k in new if old.get(k) != new[k]]
    if changed:
        return (
            "with other settings (" + ", ".join(f"{k} was {_short(old.get(k))} and is now {_short(new[k])}" for k in changed) + ")"
        )
    return "from other images" if before.get("images") != now["images"] else "by another version"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@torch.no_grad()
def _encoded(source: _Source, images: range, vae: VAE, settings: Encode, bar: Any) -> dict[str, Tensor]:
    """The tensors of one shard. Its batches begin with it, so that they are the same whichever shards were there before."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), settings.batch_size):
        rows = images[start : start + settings.batch_size]
        pixels = torch.from_numpy(source.read(rows, settings.image_size))
        for suffix, view in (("", pixels), ("_flipped", pixels.flip(2)))[: 1 + settings.flips]:
            mean, std = vae.encode(view)
            for name, values in (("latents", mean), ("std", std)):
                if values is not None:
                    stored = values.to(_DTYPES[settings.dtype]).cpu()
                    _check_finite(stored, [source.names[i] for i in rows], settings)
                    parts.setdefault(name + suffix, []).append(stored)
        bar.update(len(rows))
    labels = torch.from_numpy(source.labels[images.start : images.stop])
    return {**{name: torch.cat(values) for name, values in parts.items()}, "labels": labels}


def _check_finite(values: Tensor, names: list[str], settings: Encode) -> None:
    bad = ~values.flatten(1).isfinite().all(dim=1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise ValueError(f"vae {settings.vae!r} gives NaN, or values beyond {settings.dtype}, for {name}")


def _open(path: Path, out: Path) -> _Source:
    """The images of a folder or an .npz. ValueError for anything else, or where `out` would become one of its classes."""
    if path.suffix == ".npz":
        return _Arrays(path)
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out must lie outside the folder of images {path}, got {out}")
    return scan(path)


class _Arrays:
    """The images of an .npz, as evaluation suites publish them."""

    classes: list[str] | None = None

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = arrays.files
                self.images: np.ndarray = arrays["arr_0"] if "arr_0" in found else np.empty(0)
                name = next((name for name in ("labels", "arr_1") if name in found), None)
                labels = np.zeros(len(self.images), dtype=np.int64) if name is None else arrays[name]
            with zipfile.ZipFile(path) as archive:
                checksum = archive.getinfo("arr_0.npy").CRC if "arr_0" in found else 0
        except MemoryError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path} is no whole .npz of plain arrays: {error}") from error
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3:] != (3,) or not self.images.size:
            got = f"{self.images.shape}, {self.images.dtype}" if "arr_0" in found else f"only {', '.join(found) or 'nothing'}"
            raise ValueError(f"{path} must hold images (N, height, width, 3) of uint8 in arr_0, got {got}")
        if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"{path} must hold a label from 0 on for each of its {len(self.images)} images in {name}")
        self.labels = labels.astype(np.int64)
        self.names = [f"image {i} of {checksum:08x}" for i in range(len(self.images))]

    def read(self, indices: Sequence[int], size: int) -> np.ndarray:
        return np.stack([square(Image.fromarray(self.images[i]), size) for i in indices])
