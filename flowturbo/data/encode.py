"""`flowturbo encode`: images to latents, once, for all trainings.

Shards hold the VAE's posteriors of the images, of the mirrored images, and encoded captions.
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
from ..models.pipelines import load_pipeline, move_part, pipeline_vae
from ..models.prompt_kind import TOKENS, padded
from ..models.text_to_image import encode_prompts
from ..models.vae import VAE, load_vae
from ..runtime.device import choose_device
from ..storage.files import CheckpointError, load_tensors, open_npz, save_tensors
from ..storage.images import ImageFiles, scan, scan_captions, square
from ..storage.resume import check_same, remove_partial_files


@dataclass(frozen=True)
class Encode:
    """Encode images, and their captions, into shards of latents for training.

    The shards are written once and serve any number of trainings.
    """

    source: Path
    """A folder of images with one sub-folder per class, or an .npz, which is held in memory.
    An .npz has images in "arr_0" (N, height, width, 3) uint8 and labels in "labels" or "arr_1".
    Without labels every image is of class 0.
    With --model: a folder of images with captions, one .txt per image or a metadata.jsonl.
    Lines of metadata.jsonl have "file_name" and "text".
    """
    out: Path
    """Folder for the shards. If it already holds shards with the same settings, the run resumes."""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """Folder or hub name of a diffusers AutoencoderKL, "pixels" (grey) or "rgb".
    Ignored with --model, which brings its own.
    """
    model: str | None = None
    """Folder or hub name of a diffusers text-to-image pipeline, to train a refiner for it.
    Its VAE and text encoders encode the images and captions.
    """
    image_size: int = 256
    """Height and width that images are cropped and resized to."""
    batch_size: int = 32
    """Images encoded at a time."""
    flips: bool = True
    """Also encode the mirrored images."""
    shard_size: int | None = None
    """Images per shard. Default: 4096, or 256 with --model, since encoded captions are large."""
    dtype: Literal["float16", "float32"] = "float16"
    """Data type of the stored latents and captions."""
    device: str | None = None
    """"cuda" or "cpu". Default: a GPU if there is one."""

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
    """Images to encode, addressed by index."""

    @property
    def names(self) -> list[str]:
        """One identifier per image; a resumed run compares their digest."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], size: int) -> np.ndarray:
        """indices (N,) -> images (N, size, size, 3) uint8."""
        ...


def encode(settings: Encode) -> Path:
    """Write the shards that are missing; returns their folder, for `load_data`.

    Shard k of n is latents-<k>-of-<n>.safetensors with five-digit numbers. It holds

    - latents (N, C, H, W), as a model sees them, and std of the same shape unless the VAE is exact;
    - with flips, latents_flipped and std_flipped, of the mirrored images;
    - labels (N,) int64; or, for captioned images, the conditions of the pipeline's network: embeds
      (N, L, D), pooled (N, P) if the network takes it, lengths (N,) int64 if it must know how many
      of the L tokens are the caption's, and the same of the empty caption, one row each, named
      null_embeds and so on. `load_prompts` reads these.

    The description in its header names the images and settings it was encoded from. Each shard is
    written atomically, so an interrupted run can be resumed. With the same batch_size and device a
    resumed run gives the same bits as an uninterrupted one. ValueError for wrong settings, and for
    a folder with shards of other settings or images.
    """
    device = choose_device(settings.device)
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"out must be a folder, but {settings.out} is a file")
    images, labels, vae = _load_source(settings, device)
    expected = _shard_descriptions(settings, images, labels, vae)
    complete = _complete_shards(settings.out, expected)
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_partial_files(settings.out, "latents-*")
    with tqdm(total=len(images), disable=None, unit="image") as bar:
        for name, description in expected.items():
            rows = _rows(description["shard"], settings, len(images))
            if name in complete:
                bar.update(len(rows))
                continue
            tensors = _encode_images(images, rows, vae, settings, bar) | labels.tensors(rows)
            save_tensors(settings.out / name, tensors, description)
    return settings.out


class _Labels(Protocol):
    """Class labels or captions of the images."""

    description: dict[str, Any]
    """Goes into every shard's description; its "settings" are those that decide the values."""

    def identifier(self, image: int) -> str:
        """The image's label as text; a resumed run compares its digest."""
        ...

    def tensors(self, rows: range) -> dict[str, Tensor]:
        """The tensors to store for these images."""
        ...


class _Classes:
    def __init__(self, numbers: np.ndarray, names: list[str] | None, settings: Encode) -> None:
        self.numbers = numbers
        self.description = {
            "num_classes": len(names) if names else int(numbers.max()) + 1,
            "settings": {"vae": settings.vae, "classes": names},
        }

    def identifier(self, image: int) -> str:
        return str(self.numbers[image])

    def tensors(self, rows: range) -> dict[str, Tensor]:
        return {"labels": torch.from_numpy(self.numbers[rows.start : rows.stop])}


class _Captions:
    """Captions encoded by a pipeline; the empty caption, null_..., stands for the null class."""

    def __init__(
        self, captions: list[str], pipe: Any, settings: Encode, device: torch.device
    ) -> None:
        self.captions, self.pipe, self.settings, self.device = captions, pipe, settings, device
        self.description = {"settings": {"model": settings.model}}

    def identifier(self, image: int) -> str:
        return repr(self.captions[image])

    def tensors(self, rows: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for start in range(rows.start, rows.stop, self.settings.batch_size):
            texts = self.captions[start : min(start + self.settings.batch_size, rows.stop)]
            for name, values in self._encode(texts).items():
                parts.setdefault(name, []).append(values)
        empty = {f"null_{name}": values for name, values in self._encode([""]).items()}
        return {**{name: torch.cat(values) for name, values in parts.items()}, **empty}

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        conditions = encode_prompts(self.pipe, texts, None, self.device)
        if "lengths" in conditions:
            conditions["embeds"] = padded(conditions["embeds"], TOKENS)
        stored = {
            name: values.to(_DTYPES[self.settings.dtype] if name != "lengths" else None).cpu()
            for name, values in conditions.items()
        }
        for values in stored.values():
            _check_finite(values, texts, f"model {self.settings.model!r}", self.settings)
        return stored


def _load_source(settings: Encode, device: torch.device) -> tuple[_Source, _Labels, VAE]:
    if settings.model is None:
        source = _open_images(settings.source, settings.out)
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
            f"model {settings.model!r} must be a pipeline with a {' and a '.join(missing)} to "
            "encode images and captions"
        )
    text_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != "transformer":  # loaded without its weights
            move_part(part, device, torch.float32 if name == "vae" else text_dtype)
            part.eval().requires_grad_(False)
    return images, _Captions(images.captions, pipe, settings, device), pipeline_vae(pipe)


def _rows(shard: int, settings: Encode, count: int) -> range:
    size = cast(int, settings.shard_size)
    return range(shard * size, min((shard + 1) * size, count))


def _shard_descriptions(
    settings: Encode, source: _Source, labels: _Labels, vae: VAE
) -> dict[str, dict[str, Any]]:
    """The file name of every shard, with its description."""
    shards = -(-len(source) // cast(int, settings.shard_size))
    shared = {
        "kind": "latents",
        "format": FORMAT,
        **labels.description,
        # What decides the values. batch_size and device change no more than their last bits.
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
    descriptions = {}
    for k in range(shards):
        images = "\n".join(
            f"{labels.identifier(i)} {source.names[i]}" for i in _rows(k, settings, len(source))
        )
        digest = hashlib.sha256(images.encode(errors="surrogateescape")).hexdigest()
        descriptions[f"latents-{k:05d}-of-{shards:05d}.safetensors"] = {
            **shared,
            "shard": k,
            "images": digest,
        }
    return json.loads(json.dumps(descriptions))


def _complete_shards(out: Path, expected: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The names of the expected shards that are in the folder and undamaged.

    ValueError if the folder holds any other shard: the two sets must not be mixed.
    """
    complete = set()
    for path in sorted(out.glob("[!.]*.safetensors")):
        if path.name not in expected:
            raise ValueError(
                f"out {out} holds {path.name}, which is none of the {len(expected)} shards of "
                f"these settings: {_CURE}"
            )
        try:
            _, description = load_tensors(path)
        except CheckpointError:
            continue  # damaged: encoded again
        _check_same(f"out {out}: {path.name}", description or {}, expected[path.name])
        complete.add(path.name)
    return complete


_CURE = "choose another folder, or delete its shards"


def _check_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError unless a shard comes from the same settings, images and format version."""
    if before.get("kind") != now["kind"]:
        raise ValueError(f"{what} was made by something else: {_CURE}")
    check_same(what, before.get("settings", {}), now["settings"], cure=_CURE)
    if before != now:
        how = "from other images" if before.get("images") != now["images"] else "by another version"
        raise ValueError(f"{what} was made {how}: {_CURE}")


@torch.no_grad()
def _encode_images(
    source: _Source, images: range, vae: VAE, settings: Encode, bar: Any
) -> dict[str, Tensor]:
    """The latents of one shard.

    Batches start anew with each shard, so their values do not depend on which shards a resumed run
    skips.
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


def _check_finite(values: Tensor, names: list[str], encoder: str, settings: Encode) -> None:
    bad = ~values.reshape(len(values), -1).isfinite().all(dim=1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise ValueError(f"{encoder} gives NaN, or values beyond {settings.dtype}, for {name}")


def _open_images(path: Path, out: Path) -> _NpzImages | ImageFiles:
    """The images of a folder or an .npz.

    ValueError for anything else, and if `out` lies in the folder, where it would become a class.
    """
    if path.suffix.lower() == ".npz":
        return _NpzImages(path)
    _check_outside(path, out)
    return scan(path)


def _check_outside(path: Path, out: Path) -> None:
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out must lie outside the folder of images {path}, got {out}")


class _NpzImages:
    """The images of an .npz, in the layout in which evaluation suites publish them.

    ValueError for a file without such images, or with labels that do not fit them.
    """

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
                f"{path} must hold images (N, height, width, 3) uint8 in arr_0, got {got}"
            )
        if (
            labels.shape != (len(self.images),)
            or labels.dtype.kind not in "iu"
            or not (0 <= int(labels.min()) <= int(labels.max()) < 2**31)
        ):
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
