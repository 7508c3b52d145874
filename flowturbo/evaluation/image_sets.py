"""Sets of images to be scored, read in order: .npz files, folders of images, images of a model."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.flow_model import FlowModel
from ..models.not_finite import NotFiniteError, image_name
from ..sampling.inputs import noise_of
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..storage.files import CheckpointError, open_npz
from ..storage.folders import EXTENSIONS, files_below, images_among, suffix
from ..storage.images import read_npz, read_whole
from ..storage.text import file_path
from .metrics import Gaussian
from .npz_images import StoredImages, digest_of_arrays


class ImageSet(Protocol):
    """Images in a fixed order."""

    @property
    def description(self) -> Mapping[str, Any]:
        """The set's provenance in a report; an evaluation resumes only with the same one."""
        ...

    def __len__(self) -> int: ...

    def read(self, first: int, count: int) -> np.ndarray:
        """Images first .. first + count - 1, (count, height, width, 3) uint8."""
        ...


def open_images(path: Path, name: str) -> Shards | Files:
    """The images of an .npz, or of a folder of .npz files or image files.

    Files are in the order of their names; `storage.folders` says which count. name: of the
    argument, for messages. ValueError for any other path, CheckpointError for a damaged or
    incomplete set.
    """
    if path.suffix.lower() == ".npz":
        return Shards([path])
    if not path.is_dir():
        problem = "is a file of another kind" if path.exists() else "does not exist"
        raise ValueError(
            f"{name} must be an .npz or a folder of .npz files or images, but {path} {problem}"
        )
    names = files_below(path)
    shards = [name for name in names if suffix(name) == ".npz"]
    files = images_among(path, names, used=[*shards, "manifest.json"])
    if bool(shards) == bool(files):
        has = "both" if shards else "neither"
        raise ValueError(
            f"{name} must be a folder of .npz files or of images ({', '.join(EXTENSIONS)}), but "
            f"{path} has {has}"
        )
    if files:
        return Files(path, files)
    paths = [file_path(path, name) for name in shards]
    _check_complete(path, paths)
    return Shards(paths, path)


def _check_complete(folder: Path, paths: Sequence[Path]) -> None:
    """CheckpointError if any of the shards named ...-00000-of-00049.npz is missing."""
    matches = [re.fullmatch(r".*-(\d+)-of-(\d+)", path.stem) for path in paths]
    if any(matches):
        numbers = [(int(match[1]), int(match[2])) if match else (-1, -1) for match in matches]
        expected = [(k, numbers[0][1]) for k in range(numbers[0][1])]
        if numbers != expected:
            missing = sorted({k for k, _ in expected} - {k for k, _ in numbers})
            problem = (
                f"{', '.join(map(str, missing[:8]))} are missing"
                if missing
                else "of several sets are in it"
            )
            raise CheckpointError(
                f"{folder} is no whole set of {len(expected)} shards: shards {problem}"
            )


class Shards:
    """arr_0 (N, height, width, 3) uint8 of one .npz, or of several in order.

    Of an uncompressed file only the requested images are read. A compressed one is held in memory
    until another file is read.
    """

    def __init__(self, paths: Sequence[Path], folder: Path | None = None) -> None:
        self.arrays = [StoredImages(path) for path in paths]
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
        self._unpacked: tuple[StoredImages | None, np.ndarray] = (None, np.empty(0))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def description(self) -> dict[str, Any]:
        """The digest is that of the arrays, whatever their compression."""
        if not self._digest:
            self._digest = digest_of_arrays([array.path for array in self.arrays])
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
        file = bisect.bisect_right(self.starts, first) - 1  # a set may have thousands
        end = min(first + count, len(self))
        while self.starts[file] < end:
            array, start = self.arrays[file], self.starts[file]
            a, b = max(first - start, 0), min(end - start, array.shape[0])
            parts.append(array.rows(a, b - a) if array.stored else self._whole(array)[a:b])
            file += 1
        return np.concatenate(parts)

    def _whole(self, array: StoredImages) -> np.ndarray:
        if self._unpacked[0] is not array:
            self._unpacked = (array, read_npz(array.path))
        return self._unpacked[1]


def _manifest(folder: Path | None) -> dict[str, Any]:
    """The manifest of a folder that `flowturbo sample` wrote, without its list of files."""
    path = folder / "manifest.json" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        return {
            "manifest": {
                k: v
                for k, v in json.loads(path.read_text(encoding="utf-8")).items()
                if k != "shards"
            }
        }
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no manifest: {error}") from None


class Files:
    """Image files of one size, in any of the formats that Pillow reads."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self.paths = [file_path(folder, name) for name in names]
        self.size = read_whole(self.paths[:1])[0].shape[:2]
        self._digest = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def description(self) -> dict[str, Any]:
        if not self._digest:
            hashed = hashlib.sha256()
            files = zip(self.names, self.paths, strict=True)
            bar = tqdm(files, None, len(self), disable=None, unit="file", leave=False)
            bar.set_description("checking")
            for name, path in bar:
                try:
                    data = path.read_bytes()
                except OSError as error:
                    raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
                hashed.update(f"{name} {len(data)}\n".encode(errors="surrogateescape"))
                hashed.update(data)
            self._digest = hashed.hexdigest()
        return {
            "kind": "image files",
            "images": len(self),
            "size": list(self.size),
            "sha256": self._digest,
            "formats": sorted({suffix(name) for name in self.names}),
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
    """Images that a model samples by a plan when they are read.

    Image i has class i % (number of classes), and its noise is that of (seed, i). The model's
    decoder rounds to uint8. Reads that start at multiples of batch_size always give the same bits.
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
        indices = range(first, min(first + count, self.count))
        labels = [i % self.model.num_classes for i in indices]
        noise = noise_of(self.model, self.seed, indices)
        try:
            images = sample(
                self.model, self.plan, labels, noise=noise, output="uint8", **self.options
            )
        except NotFiniteError as error:
            raise error.named(lambda i: image_name(indices[i], labels[i], self.seed)) from None
        return images.cpu().contiguous().numpy()


class Reference:
    """What samples are compared with: a set of images, with or without feature statistics.

    ADM's reference files also hold the Gaussians of the features of a whole training set.

    images: None for a file of Gaussians alone.
    pool, spatial: the Gaussians of pool and spatial features; None where the file has none.
    """

    def __init__(self, path: Path) -> None:
        arrays = _gaussian_arrays(path) if path.suffix.lower() == ".npz" and path.is_file() else {}
        self.pool, self.spatial = (
            _gaussian(path, arrays, "mu", "sigma"),
            _gaussian(path, arrays, "mu_s", "sigma_s"),
        )
        without_images = bool(arrays) and not _has_member(path, "arr_0.npy")
        self.images = None if without_images else open_images(path, "reference")
        self.name, self._paths = path.name, [path]

    @property
    def description(self) -> dict[str, Any]:
        stored = [
            names
            for names, gaussian in (("mu, sigma", self.pool), ("mu_s, sigma_s", self.spatial))
            if gaussian is not None
        ]
        images: dict[str, Any] = (
            {"kind": ".npz", "images": 0, "sha256": digest_of_arrays(self._paths)}
            if self.images is None
            else self.images.description
        )
        return {
            **images,
            "gaussians": f"its own {' and '.join(stored)}" if stored else "of its images",
        }


def _has_member(path: Path, member: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return member in archive.namelist()


def _gaussian_arrays(path: Path) -> dict[str, np.ndarray]:
    names = ("mu", "sigma", "mu_s", "sigma_s")
    with open_npz(path) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


def _gaussian(
    path: Path, arrays: Mapping[str, np.ndarray], mean: str, covariance: str
) -> Gaussian | None:
    """The Gaussian in the arrays of these names, None without them; CheckpointError if unusable."""
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
    if problem := _no_covariance(b):
        raise CheckpointError(f"{path} must hold a covariance as {covariance}, but it {problem}")
    return Gaussian(a, (b + b.T) / 2)


def _no_covariance(matrix: Tensor) -> str:
    """Why a square matrix (D, D), float64, is no covariance, beyond what float32 rounds; "" if it
    is one.
    """
    rounding = len(matrix) * torch.finfo(torch.float32).eps * float(matrix.abs().max())
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > rounding:
        return f"is not symmetric: entries differ from their mirrors by up to {asymmetry:.3g}"
    shifted = (matrix + matrix.T) / 2 + rounding * torch.eye(
        len(matrix), dtype=matrix.dtype, device=matrix.device
    )
    if rounding and int(torch.linalg.cholesky_ex(shifted).info):
        least = float(torch.linalg.eigvalsh(matrix)[0])
        return f"has negative eigenvalues, down to {least:.3g}"
    return ""


def _float64(array: np.ndarray | None) -> Tensor | None:
    return (
        None
        if array is None or array.dtype.kind not in "fiu"
        else torch.from_numpy(array.astype(np.float64))
    )
