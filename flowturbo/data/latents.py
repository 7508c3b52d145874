"""Training data: latents with class labels.

They come from scikit-learn's digits, from files of latents, or from folders of images.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..checks import positive
from ..models.text_to_image import Labels
from ..models.vae import VAE
from ..runtime.rng import StepRandom, stream
from ..storage.files import CheckpointError, load_tensors, open_npz
from ..storage.images import scan
from ..storage.pixels import refuse_pixels, tensor_of
from .shards import check_no_images, check_set, classes_of, shards_of


class Data(Protocol):
    """The interface of training data."""

    num_classes: int
    class_names: tuple[str, ...] | None
    """The name of each label, if the data have names."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one latent; (C, T, H, W) of a video's."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, draws: StepRandom) -> tuple[Tensor, Labels]:
        """indices (N,) -> latents (N, C, H, W) float32, labels (N,) int64 or conditions (N, ...).

        All randomness comes from `draws`.
        """
        ...


class Latents:
    """Latents held in memory, in the dtype they are given in.

    mean (N, C, H, W): latents, or the mean of the encoder's posterior.
    labels (N,): integers from 0.
    std (N, C, H, W): of the posterior, which is sampled anew at each use; None for exact latents.
        It has no negative value.
    latents_flipped, std_flipped: of the mirrored images, taken with probability 1/2 at each use.
    num_classes: by default as many as class_names, or the largest label plus one.
    class_names: the name of each label, all different.
    ValueError for tensors whose shapes or values do not fit.
    """

    def __init__(
        self,
        mean: Tensor,
        labels: Tensor,
        std: Tensor | None = None,
        num_classes: int | None = None,
        latents_flipped: Tensor | None = None,
        std_flipped: Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        mean, labels = tensor_of("latents", mean), tensor_of("labels", labels)
        if mean.ndim != 4 or not len(mean):
            raise ValueError(
                f"latents must have shape (N, C, H, W) with N at least 1, got {tuple(mean.shape)}"
            )
        if labels.shape != (len(mean),) or labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(mean)} whole numbers, one a latent, got shape "
                f"{tuple(labels.shape)}, {labels.dtype}"
            )
        flipped_std_fits = (std_flipped is None) == (std is None or latents_flipped is None)
        if not flipped_std_fits:
            raise ValueError("std_flipped must come with std and latents_flipped, and they with it")
        others = {"std": std, "latents_flipped": latents_flipped, "std_flipped": std_flipped}
        for name, values in others.items():
            if values is not None and values.shape != mean.shape:
                raise ValueError(
                    f"{name} must have the latents' shape {tuple(mean.shape)}, got "
                    f"{tuple(values.shape)}"
                )
        for name, values in ({"latents": mean} | others).items():
            if values is not None:
                _check_values(name, values)
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be from 0 on, got {int(labels.min())}")
        self.mean, self.std, self.labels = mean, std, labels.to(torch.int64)
        self.latents_flipped, self.std_flipped = latents_flipped, std_flipped
        self.shape = (mean.shape[1], mean.shape[2], mean.shape[3])
        self.class_names = None if class_names is None else _names(class_names, num_classes)
        if num_classes is None:
            num_classes = len(self.class_names) if self.class_names else int(labels.max()) + 1
        self.num_classes = num_classes
        if int(labels.max()) >= self.num_classes:
            raise ValueError(f"labels must be below {self.num_classes}, got {int(labels.max())}")

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: np.ndarray, draws: StepRandom) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(indices)
        mean = self.mean[rows]
        std = None if self.std is None else self.std[rows]
        if self.latents_flipped is not None:
            flip = flips(draws)
            mean = torch.where(flip, self.latents_flipped[rows], mean)
            if std is not None and self.std_flipped is not None:
                std = torch.where(flip, self.std_flipped[rows], std)
        return sample_posterior(mean, std, draws), self.labels[rows]


class ImageFolder:
    """A folder of images with one sub-folder per class, read and encoded at each use.

    Images are mirrored with probability 1/2. The encoder runs at every training step: for a long
    training, run `flowturbo encode` once and train on its latents, which give the same batches up
    to rounding.
    """

    def __init__(self, folder: str | os.PathLike[str], vae: VAE, image_size: int) -> None:
        self.files = scan(folder)
        self.vae, self.image_size = vae, positive("image_size", image_size)
        with torch.no_grad():
            blank, _ = vae.encode(
                torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8, device="cpu")
            )
        self.shape = (blank.shape[1], blank.shape[2], blank.shape[3])
        self.num_classes = len(self.files.classes)
        self.class_names: tuple[str, ...] | None = tuple(self.files.classes)

    def __len__(self) -> int:
        return len(self.files)

    @torch.no_grad()
    def batch(self, indices: np.ndarray, draws: StepRandom) -> tuple[Tensor, Tensor]:
        """As `Data.batch`; the latents are on the VAE's device."""
        images = torch.from_numpy(self.files.read(indices, self.image_size))
        images = torch.where(flips(draws), images.flip(2), images)
        mean, std = self.vae.encode(images)
        return sample_posterior(mean, std, draws), torch.from_numpy(self.files.labels[indices])


def _names(names: Sequence[str], num_classes: int | None) -> tuple[str, ...]:
    """Class names as they are kept; ValueError unless each class has one of its own."""
    if isinstance(names, str):
        raise TypeError(f"class_names must be a list of names, got {names!r}")
    kept = tuple(names)
    if wrong := [name for name in kept if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"class_names must be texts that are not blank, got {wrong[0]!r}")
    if twice := [name for name, count in Counter(kept).items() if count > 1]:
        raise ValueError(f"class_names must all be different, got {twice[0]!r} more than once")
    if not kept or num_classes not in (None, len(kept)):
        raise ValueError(
            f"class_names must be {num_classes or 'at least one'}, one a class, got {len(kept)}"
        )
    return kept


def _check_values(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(
            f"{name} must be floating point, got {values.dtype}: pixels must be encoded first"
        )
    # In pieces: one mask for everything would take half the memory of float16 latents.
    if not all(piece.isfinite().all() for piece in values.split(4096)):
        raise ValueError(f"{name} must be finite, got NaN or infinity in them")
    if name.startswith("std") and values.amin() < 0:
        raise ValueError(
            f"{name} must not be negative, got {float(values.amin()):g}: it is a standard "
            "deviation, not its logarithm"
        )


def flips(draws: StepRandom) -> Tensor:
    """Which rows are mirrored, (N, 1, 1, 1) bool."""
    return (draws.uniform() < 0.5).view(-1, 1, 1, 1)


def sample_posterior(mean: Tensor, std: Tensor | None, draws: StepRandom) -> Tensor:
    """mean, std (N, C, H, W) -> a sample of the posterior, float32; the mean where std is None."""
    if std is None:
        return mean.float()
    return mean.float() + std.float() * draws.normal(mean.shape[1:]).to(mean.device)


def digits(part: str = "train") -> Latents:
    """scikit-learn's 1797 handwritten digits as latents (1, 8, 8) in [-1, 1].

    part: "train" (four fifths) or "test" (every fifth image).
    ValueError for another part, and without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits need scikit-learn: pip install 'flowturbo[digits]'") from None
    images, labels = load_digits(return_X_y=True)
    held_out = np.arange(len(images)) % 5 == 4
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    rows = held_out if part == "test" else ~held_out
    pixels = torch.from_numpy(images[rows]).float().view(-1, 1, 8, 8) / 8 - 1
    return Latents(pixels, torch.from_numpy(labels[rows]), num_classes=10)


def load_data(
    source: str | os.PathLike[str], vae: VAE | None = None, image_size: int | None = None
) -> Data:
    """Open training data with class labels.

    source is one of

    - "digits";
    - an .npz with arrays "latents" (N, C, H, W) and "labels" (N,). Optional: "std", of the
      encoder's posterior, which is then sampled anew at each use; "latents_flipped", of the
      mirrored images, with "std_flipped" if there is "std"; "class_names" (K,), texts, the name
      of each label;
    - a folder of .safetensors shards, each with these same names. Shards from `flowturbo encode`
      must be a complete set and state the number of classes; without that statement it is the
      largest label plus one;
    - a folder of images with one sub-folder per class, the only source that needs vae and
      image_size.

    Latents are as the model sees them, scaled by the VAE's factor, float16 or wider. Files of
    latents are held in memory. ValueError for any other source, CheckpointError for a damaged or
    incomplete one.
    """
    if source == "digits":
        return digits()
    path = Path(source)
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    if not path.is_dir():
        raise ValueError(
            "data must be 'digits', an .npz file, a folder of .safetensors shards or a folder of "
            "images with a sub-folder a class, "
            f"got {str(source)!r}"
        )
    shards = shards_of(path)
    if shards:
        check_no_images(path)
        return _from_shards(shards)
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise ValueError(
            "data must be a folder of .safetensors shards or of images with a sub-folder a "
            f"class, but {path} has neither"
        )
    if vae is None or image_size is None:
        raise ValueError(
            f"data {str(source)!r} is a folder of images, which needs a vae and an image_size"
        )
    return ImageFolder(path, vae, image_size)


def needs_vae(source: str | os.PathLike[str]) -> bool:
    """Whether `load_data` treats this source as a folder of images."""
    path = Path(source)
    return source != "digits" and path.is_dir() and not shards_of(path)


# The tensors that files of latents hold; any others are ignored.
_NAMES = ("latents", "labels", "std", "latents_flipped", "std_flipped")

Parts = dict[str, Tensor]


def _from_npz(path: Path) -> Latents:
    with open_npz(path) as arrays:
        names = list(arrays)
        found = {k: arrays[k] for k in _NAMES if k in names}
        classes = arrays["class_names"] if "class_names" in names else None
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind != "U"):
        raise CheckpointError(
            f"{path}: class_names must be an array (K,) of texts, got {classes.shape}, "
            f"{classes.dtype}"
        )
    try:
        part = {k: tensor_of(k, array) for k, array in found.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    listed = None if classes is None else classes.tolist()
    return _latents(path, part, None, names, encoded=False, classes=listed)


def _from_shards(paths: list[Path]) -> Latents:
    loaded = {path: load_tensors(path) for path in paths}
    descriptions = {path: description for path, (_, description) in loaded.items()}
    num_classes = check_set(descriptions)
    if any("embeds" in tensors for tensors, _ in loaded.values()):
        raise ValueError(
            f"data {paths[0].parent} holds latents with prompts, which are for the refiner of a "
            "text-to-image model"
        )
    parts = {
        path: {k: v for k, v in tensors.items() if k in _NAMES}
        for path, (tensors, _) in loaded.items()
    }
    del loaded
    first = paths[0]
    for path, part in parts.items():
        encoded = "settings" in (descriptions[path] or {})
        shard = _latents(path, part, num_classes, list(part), encoded)
        part["labels"] = shard.labels  # in one type
        if part.keys() != parts[first].keys() or shard.shape != tuple(
            parts[first]["latents"].shape[1:]
        ):
            raise CheckpointError(
                f"{path} holds {_contents(part)}, but {first.name} holds {_contents(parts[first])}"
            )
    # One name at a time, so that at most one of them is in memory twice.
    joined = {
        name: torch.cat([part.pop(name) for part in parts.values()]) for name in list(parts[first])
    }
    classes = classes_of(descriptions[first])
    return _latents(first.parent, joined, num_classes, list(joined), encoded=True, classes=classes)


def _latents(
    path: Path,
    part: Parts,
    num_classes: int | None,
    names: list[str],
    encoded: bool,
    classes: Sequence[str] | None = None,
) -> Latents:
    """The latents in a file's tensors; CheckpointError, naming the file, if they do not fit.

    names: of all tensors in the file, for the message.
    encoded: whether `flowturbo encode` made them; in other files they may be pixels.
    classes: the names of the labels, if the file has any.
    """
    if "latents" not in part or "labels" not in part:
        raise CheckpointError(
            f"{path} must hold 'latents' and 'labels', got "
            f"{', '.join(sorted(names)[:8]) or 'nothing'}"
        )
    others = {name: part.get(name) for name in ("std", "latents_flipped", "std_flipped")}
    try:
        latents = Latents(
            part["latents"],
            part["labels"],
            num_classes=num_classes,
            class_names=classes,
            **others,
        )
        for name in () if encoded else ("latents", "latents_flipped"):
            if name in part:
                refuse_pixels(name, part[name], "encode pixels first, or scale them to -1 to 1")
        return latents
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _contents(part: Parts) -> str:
    return f"{', '.join(sorted(part))} with latents of shape {tuple(part['latents'].shape[1:])}"


def order(length: int, seed: int, first: int, count: int) -> np.ndarray:
    """Dataset indices (count,) int64 at positions first .. first + count - 1 of the training order.

    The order is an endless series of epochs of `length` rows, each with its own permutation. The
    index at a position is a function of (seed, position) alone, so any process and any resumed run
    computes it without state. Calls within one epoch shuffle once.
    """
    positions = np.arange(first, first + count)
    epochs, places = np.divmod(positions, length)
    indices = np.empty(count, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1) if count else ():
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(length, seed, epoch)[places[in_epoch]]
    return indices


@lru_cache(maxsize=1)  # the current epoch's: a training goes through them in order
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return stream(seed, epoch, lane=_ORDER_LANE).permutation(length)


_ORDER_LANE = 2**62  # of the random streams: no other use draws from this lane
