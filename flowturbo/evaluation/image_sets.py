"""Sets of images to be scored, read in order, a run at a time: files in ADM's layout, folders of
images, a model's own images.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.flow_model import FlowModel
from ..runtime import rng
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..storage.files import CheckpointError, open_npz
from ..storage.images import EXTENSIONS, read_npz, read_whole
from .metrics import Gaussian


class ImageSet(Protocol):
    """Images in a fixed order."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What a report says of them; an evaluation goes on only with the same."""
        ...

    def __len__(self) -> int: ...

    def read(self, first: int, count: int) -> np.ndarray:
        """Images first .. first + count, (count, height, width, 3) uint8."""
        ...


def open_images(path: Path, name: str) -> Shards | Files:
    """The images of an .npz, or of a folder of .npz files or of image files, in the order of their
    names. name: of the argument.
    """
    if path.suffix == ".npz":
        return Shards([path])
    if not path.is_dir():
        what = "is a file of another kind" if path.exists() else "does not exist"
        raise ValueError(
            f"{name} must be an .npz or a folder of .npz files or images, but {path} {what}"
        )
    found = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    shards, files = (
        [p for p in found if p.suffix == ".npz"],
        [p for p in found if p.suffix.lower() in EXTENSIONS],
    )
    if bool(shards) == bool(files):
        has = "both" if shards else "neither"
        raise ValueError(
            f"{name} must be a folder of .npz files or of images ({', '.join(EXTENSIONS)}), but "
            f"{path} has {has}"
        )
    if files:
        return Files(path, files)
    _check_whole(path, shards)
    return Shards(shards, path)


def _check_whole(folder: Path, paths: Sequence[Path]) -> None:
    """That of shards named ...-00000-of-00049.npz none is missing."""
    named = [re.fullmatch(r".*-(\d+)-of-(\d+)", path.stem) for path in paths]
    if any(named):
        numbers = [(int(match[1]), int(match[2])) if match else (-1, -1) for match in named]
        wanted = [(k, numbers[0][1]) for k in range(numbers[0][1])]
        if numbers != wanted:
            missing = sorted({k for k, _ in wanted} - {k for k, _ in numbers})
            which = (
                f"{', '.join(map(str, missing[:8]))} are missing"
                if missing
                else "of several sets are in it"
            )
            raise CheckpointError(
                f"{folder} is no whole set of {len(wanted)} shards: shards {which}"
            )


class Shards:
    """arr_0 (N, height, width, 3) uint8 of one .npz, or of several joined. Of a file that is not
    compressed only what is asked for is read; a compressed one is held in memory while its images
    are."""

    def __init__(self, paths: Sequence[Path], folder: Path | None = None) -> None:
        self.arrays = [_Array(path) for path in paths]
        for array in self.arrays:
            if array.shape[1:] != self.arrays[0].shape[1:]:
                first = self.arrays[0]
                raise CheckpointError(
                    f"{array.path} has images of {array.shape[1:]}, but {first.path} of "
                    f"{first.shape[1:]}"
                )
        self.starts = np.cumsum([0, *(array.shape[0] for array in self.arrays)]).tolist()
        self.folder = folder
        self._digest = ""
        self._unpacked: tuple[_Array | None, np.ndarray] = (None, np.empty(0))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def description(self) -> dict[str, Any]:
        """The digest is over all arrays of the files as they are read, whatever their
        compression.
        """
        if not self._digest:
            self._digest = _digest_of_arrays([array.path for array in self.arrays])
        size = list(self.arrays[0].shape[1:3])
        return {
            "kind": ".npz",
            "images": len(self),
            "size": size,
            "sha256": self._digest,
            **_manifest(self.folder),
        }

    def read(self, first: int, count: int) -> np.ndarray:
        parts = []
        for array, start in zip(self.arrays, self.starts, strict=False):
            a, b = max(first - start, 0), min(first + count - start, array.shape[0])
            if a < b:
                parts.append(array.rows(a, b - a) if array.stored else self._whole(array)[a:b])
        return np.concatenate(parts)

    def _whole(self, array: _Array) -> np.ndarray:
        if self._unpacked[0] is not array:
            self._unpacked = (array, read_npz(array.path))
        return self._unpacked[1]


class _Array:
    """Where arr_0 stands in an .npz. CheckpointError for a file without such images."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            with zipfile.ZipFile(path) as archive:
                member = archive.getinfo("arr_0.npy")
                with archive.open(member) as file:
                    self.shape = _header(file)
            self.stored = member.compress_type == zipfile.ZIP_STORED
            if (
                self.stored
            ):  # the values as they are stand behind the zip's header and that of the array
                with open(path, "rb") as plain:
                    plain.seek(member.header_offset + 26)
                    plain.seek(sum(struct.unpack("<HH", plain.read(4))), os.SEEK_CUR)
                    _header(plain)
                    self.offset = plain.tell()
        except KeyError:
            raise CheckpointError(
                f"{path} has no arr_0, the images (N, height, width, 3) uint8 of ADM's layout"
            ) from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path} is no whole .npz of images: {error or type(error).__name__}"
            ) from error

    def rows(self, first: int, count: int) -> np.ndarray:
        row = math.prod(self.shape[1:])
        values = np.fromfile(
            self.path, dtype=np.uint8, count=count * row, offset=self.offset + first * row
        )
        return values.reshape(count, *self.shape[1:])


def _header(file: IO[bytes]) -> tuple[int, int, int, int]:
    """The shape of an array of images, whose header is read."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not math.prod(shape) or fortran:
        raise ValueError(
            f"arr_0 must be (N, height, width, 3) uint8 with N at least 1, got {shape} {dtype}"
        )
    return shape


def _digest_of_arrays(paths: Sequence[Path]) -> str:
    """SHA-256 over the arrays of some .npz files; zipfile compares each with its checksum."""
    hashed = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, disable=None, unit="B", unit_scale=True, desc="checking", leave=False
    ) as bar:
        for path in paths:
            try:
                with zipfile.ZipFile(path) as archive:
                    for member in sorted(archive.infolist(), key=lambda member: member.filename):
                        hashed.update(f"{member.filename} {member.file_size}\n".encode())
                        with archive.open(member) as file:
                            while piece := file.read(1 << 22):
                                hashed.update(piece)
                        bar.update(member.compress_size)
            except (OSError, EOFError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{path} is no whole .npz of images: {error}") from error
    return hashed.hexdigest()


def _manifest(folder: Path | None) -> dict[str, Any]:
    """What a folder of samples says of how they were made, without its list of files."""
    path = folder / "manifest.json" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        return {
            "manifest": {k: v for k, v in json.loads(path.read_text()).items() if k != "shards"}
        }
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no manifest: {error}") from None


class Files:
    """Image files of one size, whatever their format."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self.folder, self.paths = folder, list(paths)
        self.size = read_whole(self.paths[:1])[0].shape[:2]
        self._digest = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def description(self) -> dict[str, Any]:
        if not self._digest:
            hashed = hashlib.sha256()
            for path in tqdm(self.paths, disable=None, unit="file", desc="checking", leave=False):
                data = path.read_bytes()
                hashed.update(
                    f"{path.relative_to(self.folder)} {len(data)}\n".encode(
                        errors="surrogateescape"
                    )
                )
                hashed.update(data)
            self._digest = hashed.hexdigest()
        found = {
            "kind": "image files",
            "images": len(self),
            "size": list(self.size),
            "sha256": self._digest,
        }
        return {
            **found,
            "formats": sorted({path.suffix.lower() for path in self.paths}),
            **_manifest(self.folder),
        }

    def read(self, first: int, count: int) -> np.ndarray:
        paths = self.paths[first : first + count]
        images = read_whole(paths)
        for path, image in zip(paths, images, strict=True):
            if image.shape[:2] != self.size:
                raise ValueError(
                    f"images must be of one size, but {path} is of {image.shape[:2]} and "
                    f"{self.paths[0]} of {self.size}"
                )
        return np.stack(images)


class GeneratedImages:
    """Images that a model makes by a plan as they are asked for: image i of class i % (number of
    classes), from noise (seed, i).

    Rounded to uint8 by the model's decoder. Read from multiples of batch_size on they are the same
    to the last bit.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        count: int,
        guidance: float,
        guidance_channels: int | None,
        seed: int,
        batch_size: int,
    ) -> None:
        self.model, self.plan, self.count = model, plan, count
        self.options: dict[str, Any] = dict(
            guidance=guidance, guidance_channels=guidance_channels, batch_size=batch_size
        )
        self.seed = seed
        self.description: dict[str, Any] = {
            "kind": "made by the model",
            "plan": str(plan),
            "images": count,
        }
        if plan.name != str(plan):
            self.description["steps"] = repr(plan)

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, count: int) -> np.ndarray:
        numbers = range(first, min(first + count, self.count))
        labels = [i % self.model.num_classes for i in numbers]
        noise = rng.noise(self.model.latent_shape, self.seed, numbers)
        images = sample(self.model, self.plan, labels, noise=noise, output="uint8", **self.options)
        return images.cpu().contiguous().numpy()


class Reference:
    """What samples are compared with: images, and in ADM's files also Gaussians of the features of
    a whole training set.

    pool, spatial: those Gaussians, or None where the file has none. images: None in a file of
        Gaussians alone.
    """

    def __init__(self, path: Path) -> None:
        arrays = _gaussian_arrays(path) if path.suffix == ".npz" and path.is_file() else {}
        self.pool, self.spatial = (
            _gaussian(path, arrays, "mu", "sigma"),
            _gaussian(path, arrays, "mu_s", "sigma_s"),
        )
        alone = bool(arrays) and not _has(path, "arr_0.npy")
        self.images = None if alone else open_images(path, "reference")
        self.name, self._paths = path.name, [path]

    @property
    def description(self) -> dict[str, Any]:
        stored = [
            names
            for names, found in (("mu, sigma", self.pool), ("mu_s, sigma_s", self.spatial))
            if found is not None
        ]
        if self.images is None:
            found: dict[str, Any] = {
                "kind": ".npz",
                "images": 0,
                "sha256": _digest_of_arrays(self._paths),
            }
        else:
            found = self.images.description
        return {
            **found,
            "gaussians": f"its own {' and '.join(stored)}" if stored else "of its images",
        }


def _has(path: Path, member: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return member in archive.namelist()


def _gaussian_arrays(path: Path) -> dict[str, np.ndarray]:
    names = ("mu", "sigma", "mu_s", "sigma_s")
    with open_npz(path) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


def _gaussian(
    path: Path, arrays: Mapping[str, np.ndarray], mean: str, covariance: str
) -> Gaussian | None:
    if mean not in arrays and covariance not in arrays:
        return None
    shapes = [arrays[name].shape if name in arrays else None for name in (mean, covariance)]
    a, b = (_float64(arrays.get(name)) for name in (mean, covariance))
    if (
        a is None
        or b is None
        or a.ndim != 1
        or b.shape != (len(a), len(a))
        or not (a.isfinite().all() and b.isfinite().all())
    ):
        raise CheckpointError(
            f"{path} must hold {mean} (D,) and {covariance} (D, D), finite numbers, got shapes "
            f"{shapes}"
        )
    return Gaussian(a, b)


def _float64(array: np.ndarray | None) -> Tensor | None:
    return (
        None
        if array is None or array.dtype.kind not in "fiu"
        else torch.from_numpy(array.astype(np.float64))
    )
