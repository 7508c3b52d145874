"""Images to latents, once, for all trainings: shards of a VAE's posteriors, of those of the
mirrored images, and of captions.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import positive
from ..models.pipelines import load_pipeline, move_part
from ..models.text_to_image import encode_prompts
from ..models.vae import VAE, DiffusersVAE, load_vae
from ..runtime.device import choose_device
from ..storage.files import CheckpointError, load_tensors, open_npz, save_tensors
from ..storage.images import ImageFiles, scan, scan_captions, square
from ..storage.resume import check_same, remove_partial_files


@dataclass(frozen=True)
class Encode:
    """Encode images, and captions if they have them, into shards of latents, once for all
    trainings.
    """

    source: Path
    """A folder of images with a sub-folder a class; or an .npz of images (N, height, width, 3)
    uint8 in "arr_0", with their labels in "labels" or "arr_1" (without: all of class 0), which is
    held in memory. With a model: a folder of images with captions, in metadata.jsonl (a line each
    with "file_name" and "text") or in a .txt beside each image."""
    out: Path
    """Folder for the shards. One that holds shards of the same encoding is gone on with."""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """Folder or hub name of a diffusers AutoencoderKL, or "pixels"; with a model, its own is
    used.
    """
    model: str | None = None
    """Folder or hub name of a diffusers text-to-image pipeline, by whose VAE and text encoders
    images and captions are encoded, for the training of its refiner."""
    image_size: int = 256
    """Side of the square that images are cropped to."""
    batch_size: int = 32
    """Images at a time."""
    flips: bool = True
    """Encode the mirrored images too."""
    shard_size: int | None = None
    """Images a shard; left out: 4096, with captions 256, since their encodings are large."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored latents and captions."""
    device: str | None = None
    """"cuda" or "cpu"; left out: a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("source", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        if self.shard_size is None:
            object.__setattr__(self, "shard_size", 256 if self.model else 4096)
        for name in ("image_size", "batch_size", "shard_size"):
            positive(name, getattr(self, name))
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")


_DTYPES = {"float16": torch.float16, "float32": torch.float32}
FORMAT = 1


class _Source(Protocol):
    """Images to encode, by number."""

    @property
    def names(self) -> list[str]:
        """What an image is known by when an encoding goes on."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], size: int) -> np.ndarray:
        """(N, size, size, 3) uint8."""
        ...


def encode(settings: Encode) -> Path:
    """Write the shards that are not there yet; returns their folder, for load_data.

    Shard k is latents-0000k-of-0000n.safetensors, with latents, std (unless the VAE is exact),
    labels and, with flips,
    latents_flipped and std_flipped: latents (N, C, H, W) as a model sees them, labels (N,) int64.
    Of captioned images it holds, in place of labels, what the pipeline's networks are told: embeds
    (N, L, D), perhaps pooled (N, P), and the same of the empty caption, null_embeds (1, L, D) and
    null_pooled, for load_prompts. Its description says which images and settings it was made from.
    Shards appear whole or not at all, so that a stopped run can be started again; for one
    batch_size and device they hold the same values as those of a run that was not stopped.
    """
    device = choose_device(settings.device)
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"out must be a folder, but {settings.out} is a file")
    images, labels, vae = _opened(settings, device)
    wanted = _shard_descriptions(settings, images, labels, vae)
    there = _there(settings.out, wanted)
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_partial_files(settings.out, "latents-*")
    with tqdm(total=len(images), disable=None, unit="image") as bar:
        for name, description in wanted.items():
            rows = _rows(description["shard"], settings, len(images))
            if name not in there:
                tensors = _encoded(images, rows, vae, settings, bar) | labels.encoded(rows)
                save_tensors(settings.out / name, tensors, description)
            else:
                bar.update(len(rows))
    return settings.out


class _Labels(Protocol):
    """What is known of the images beside their pixels."""

    description: dict[str, Any]
    """Of all shards; "settings" are those of its settings that decide the values."""

    def known(self, image: int) -> str:
        """What tells one label from another when an encoding goes on."""
        ...

    def encoded(self, rows: range) -> dict[str, Tensor]:
        """The tensors of these images."""
        ...


class _Classes:
    def __init__(self, numbers: np.ndarray, names: list[str] | None, settings: Encode) -> None:
        self.numbers = numbers
        self.description = {
            "num_classes": len(names) if names else int(numbers.max()) + 1,
            "settings": {"vae": settings.vae, "classes": names},
        }

    def known(self, image: int) -> str:
        return str(self.numbers[image])

    def encoded(self, rows: range) -> dict[str, Tensor]:
        return {"labels": torch.from_numpy(self.numbers[rows.start : rows.stop])}


class _Captions:
    """Prompts, encoded by a pipeline; and the empty one, as null_..., in the place of a class that
    is no class.
    """

    def __init__(
        self, captions: list[str], pipe: Any, settings: Encode, device: torch.device
    ) -> None:
        self.captions, self.pipe, self.settings, self.device = captions, pipe, settings, device
        self.description = {"settings": {"model": settings.model}}

    def known(self, image: int) -> str:
        return repr(self.captions[image])

    def encoded(self, rows: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for start in range(rows.start, rows.stop, self.settings.batch_size):
            texts = self.captions[start : min(start + self.settings.batch_size, rows.stop)]
            for name, values in self._stored(texts).items():
                parts.setdefault(name, []).append(values)
        empty = {f"null_{name}": values for name, values in self._stored([""]).items()}
        return {**{name: torch.cat(values) for name, values in parts.items()}, **empty}

    def _stored(self, texts: list[str]) -> dict[str, Tensor]:
        found = encode_prompts(self.pipe, texts, None, self.device)
        stored = {
            name: values.to(_DTYPES[self.settings.dtype]).cpu() for name, values in found.items()
        }
        for values in stored.values():
            _check_finite(values, texts, f"model {self.settings.model!r}", self.settings)
        return stored


def _opened(settings: Encode, device: torch.device) -> tuple[_Source, _Labels, VAE]:
    if settings.model is None:
        source = _open(settings.source, settings.out)
        return (
            source,
            _Classes(source.labels, source.classes, settings),
            load_vae(settings.vae, device, torch.float32),
        )
    _check_outside(settings.source, settings.out)
    images = scan_captions(settings.source)
    pipe = load_pipeline(settings.model, ("text", "vae"))
    missing = [name for name in ("vae", "text_encoder") if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"model {settings.model!r} must be a pipeline with {' and '.join(missing)} to encode "
            "with"
        )
    wide = torch.float32 if device.type == "cpu" else torch.bfloat16
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != "transformer":  # it is a shell, without weights
            move_part(part, device, torch.float32 if name == "vae" else wide)
            part.eval().requires_grad_(False)
    return images, _Captions(images.captions, pipe, settings, device), DiffusersVAE(pipe.vae)


def _rows(shard: int, settings: Encode, count: int) -> range:
    size = cast(int, settings.shard_size)
    return range(shard * size, min((shard + 1) * size, count))


def _shard_descriptions(
    settings: Encode, source: _Source, labels: _Labels, vae: VAE
) -> dict[str, dict[str, Any]]:
    """File names of all shards, with their descriptions."""
    shards = -(-len(source) // cast(int, settings.shard_size))
    shared = {
        "kind": "latents",
        "format": FORMAT,
        **labels.description,
        # What decides the values. batch_size and device touch their last bits alone.
        "settings": {
            "scale": getattr(vae, "scale", 1.0),
            "shift": getattr(vae, "shift", 0.0),
            "image_size": settings.image_size,
            "flips": settings.flips,
            "shard_size": settings.shard_size,
            "dtype": settings.dtype,
            **labels.description["settings"],
        },
        "shards": shards,
    }
    wanted = {}
    for k in range(shards):
        known = "\n".join(
            f"{labels.known(i)} {source.names[i]}" for i in _rows(k, settings, len(source))
        )
        digest = hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()
        wanted[f"latents-{k:05d}-of-{shards:05d}.safetensors"] = {
            **shared,
            "shard": k,
            "images": digest,
        }
    return json.loads(json.dumps(wanted))


def _there(out: Path, wanted: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The wanted shards that are there and whole. ValueError if the folder holds any others, which
    must not be mixed with these.
    """
    there = set()
    for path in sorted(out.glob("[!.]*.safetensors")):
        if path.name not in wanted:
            raise ValueError(
                f"out {out} holds {path.name}, which is none of the {len(wanted)} shards of these "
                f"settings: {_CURE}"
            )
        try:
            _, description = load_tensors(path)
        except CheckpointError:
            continue  # damaged: made again
        _check_same(f"out {out}: {path.name}", description or {}, wanted[path.name])
        there.add(path.name)
    return there


_CURE = "choose another folder, or delete its shards"


def _check_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError, unless a shard is of the same settings, images and version."""
    if before.get("kind") != now["kind"]:
        raise ValueError(f"{what} was made by something else: {_CURE}")
    check_same(what, before.get("settings", {}), now["settings"], cure=_CURE)
    if before != now:
        how = "from other images" if before.get("images") != now["images"] else "by another version"
        raise ValueError(f"{what} was made {how}: {_CURE}")


@torch.no_grad()
def _encoded(
    source: _Source, images: range, vae: VAE, settings: Encode, bar: Any
) -> dict[str, Tensor]:
    """The tensors of one shard. Its batches begin with it, so that they are the same whichever
    shards were there before.
    """
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), settings.batch_size):
        rows = images[start : start + settings.batch_size]
        pixels = torch.from_numpy(source.read(rows, settings.image_size))
        for suffix, view in (("", pixels), ("_flipped", pixels.flip(2)))[: 1 + settings.flips]:
            mean, std = vae.encode(view)
            for name, values in (("latents", mean), ("std", std)):
                if values is not None:
                    stored = values.to(_DTYPES[settings.dtype]).cpu()
                    _check_finite(
                        stored, [source.names[i] for i in rows], f"vae {settings.vae!r}", settings
                    )
                    parts.setdefault(name + suffix, []).append(stored)
        bar.update(len(rows))
    return {name: torch.cat(values) for name, values in parts.items()}


def _check_finite(values: Tensor, names: list[str], who: str, settings: Encode) -> None:
    bad = ~values.flatten(1).isfinite().all(dim=1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise ValueError(f"{who} gives NaN, or values beyond {settings.dtype}, for {name}")


def _open(path: Path, out: Path) -> _Arrays | ImageFiles:
    """The images of a folder or an .npz. ValueError for anything else, or where `out` would become
    one of its classes.
    """
    if path.suffix == ".npz":
        return _Arrays(path)
    _check_outside(path, out)
    return scan(path)


def _check_outside(path: Path, out: Path) -> None:
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out must lie outside the folder of images {path}, got {out}")


class _Arrays:
    """The images of an .npz, as evaluation suites publish them."""

    classes: list[str] | None = None

    def __init__(self, path: Path) -> None:
        with open_npz(path) as arrays:
            names = list(arrays)
            self.images: np.ndarray = arrays["arr_0"] if "arr_0" in names else np.empty(0)
            name = next((name for name in ("labels", "arr_1") if name in names), None)
            labels = np.zeros(len(self.images), dtype=np.int64) if name is None else arrays[name]
            with zipfile.ZipFile(path) as archive:
                checksum = archive.getinfo("arr_0.npy").CRC if len(self.images) else 0
        if (
            self.images.dtype != np.uint8
            or self.images.ndim != 4
            or self.images.shape[3:] != (3,)
            or not self.images.size
        ):
            got = (
                f"{self.images.shape}, {self.images.dtype}"
                if "arr_0" in names
                else f"only {', '.join(names) or 'nothing'}"
            )
            raise ValueError(
                f"{path} must hold images (N, height, width, 3) of uint8 in arr_0, got {got}"
            )
        if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"{path} must hold a label from 0 on for each of its {len(self.images)} images in "
                f"{name}"
            )
        self.labels = labels.astype(np.int64)
        self.names = [f"image {i} of {checksum:08x}" for i in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int], size: int) -> np.ndarray:
        return np.stack([square(Image.fromarray(self.images[i]), size) for i in indices])
