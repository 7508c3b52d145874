"""Sets of images as shards in a folder, with a manifest.

A shard is complete or absent, so the shards in the folder are the only record of progress. The
manifest holds the digests by which a complete set is verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import CheckpointError, atomic_write, load_arrays, save_arrays, write_json
from .resume import check_same, difference, remove_partial_files

MANIFEST = "manifest.json"
FORMAT = 1
CLASS_NAMES = "class_names"
"""Of a shard and of a manifest: what labels 0, 1, ... are called."""
NOT_FINITE = "not_finite"
"""Of a shard and of a manifest: the numbers of images whose latents or pixels held NaN or infinity.
"""


class Shard(NamedTuple):
    """The name of a shard's file, and the numbers of its images."""

    name: str
    images: range


def cut(num: int, size: int) -> list[Shard]:
    """Cut images 0 to num - 1 into shards of `size` images; the last may be smaller."""
    count = -(-num // size)
    return [
        Shard(f"images-{k:05d}-of-{count:05d}.npz", range(k * size, min((k + 1) * size, num)))
        for k in range(count)
    ]


def count_images(out: Path, shards: list[Shard]) -> int:
    """The number of images in the shards that exist."""
    names = set(os.listdir(out))
    return sum(len(shard.images) for shard in shards if shard.name in names)


def missing_shards(out: Path, shards: list[Shard], settings: Mapping[str, Any]) -> list[Shard]:
    """The shards that are missing or damaged; damaged ones give a warning.

    Raises ValueError if the folder holds shards of another set or with other settings.
    """
    missing = {shard.name: shard for shard in shards}
    advice = "choose another folder, or delete its shards"
    for path in sorted(out.glob("images-*.npz")):
        try:
            arrays, stored = _load(path)
        except CheckpointError as error:
            if path.name not in missing:
                raise ValueError(
                    f"out {out} holds {path.name}, which is none of the {len(shards)} shards: "
                    f"{advice}"
                ) from error
            warnings.warn(f"{error}: it is made again", stacklevel=4)
            continue
        check_same(f"out {out}: {path.name}", stored, settings, cure=advice)
        if path.name in missing and np.array_equal(arrays["indices"], missing[path.name].images):
            del missing[path.name]
    return list(missing.values())


def save_shard(
    out: Path,
    shard: Shard,
    images: np.ndarray,
    labels: np.ndarray,
    settings: Mapping[str, Any],
    not_finite: Sequence[int] = (),
    class_names: Sequence[str] | None = None,
) -> None:
    """Write one shard.

    images: (N, height, width, 3) uint8.
    labels: (N,) int64, or texts.
    settings: everything that the images depend on.
    not_finite: the numbers of images that could not be made. Only if there are any, the file has
        an array of that name.
    class_names: what the labels are called, by number, if it is known.
    """
    arrays = {"arr_0": images, "labels": labels, "indices": np.array(shard.images)}
    if class_names is not None:
        arrays[CLASS_NAMES] = np.array(class_names)
    if not_finite:
        arrays[NOT_FINITE] = np.array(not_finite)
    save_arrays(
        out / shard.name, arrays, {"kind": "images", "format": FORMAT, "settings": dict(settings)}
    )


def remove_partial_shards(out: Path) -> None:
    """Remove temporary files that killed runs left.

    No other process may be writing to the folder.
    """
    remove_partial_files(out, "images-*", MANIFEST)


def write_manifest(out: Path, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a complete set and write its manifest -> the manifest.

    about: notes to store in it. Raises CheckpointError as `verify` does.
    """
    manifest = {**_manifest_of(out), "about": dict(about or {})}
    write_json(out / MANIFEST, manifest)
    return manifest


def verify(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every byte of a set against its manifest -> the manifest.

    Each image must exist once, in its place. Raises CheckpointError saying what is missing or
    wrong.
    """
    out = Path(out)
    if not (out / MANIFEST).is_file():
        raise CheckpointError(
            f"{out} holds no {MANIFEST}: a run writes it when all shards are there, and goes on "
            "if started again"
        )
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        about = manifest.pop("about")
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{out / MANIFEST} is no whole manifest: {error}") from error
    if changed := difference(manifest, _manifest_of(out)):
        raise CheckpointError(f"{out} is not what its {MANIFEST} says: {changed}")
    return {**manifest, "about": about}


def join(out: str | os.PathLike[str], target: str | os.PathLike[str]) -> dict[str, Any]:
    """Verify a set and write it as one .npz -> the manifest.

    The file holds arr_0 (N, height, width, 3) uint8 and labels (N,), as evaluation suites read
    them, and class_names if the set has them. Shards are copied one at a time. Raises ValueError
    for a bad target, CheckpointError as `verify` does.
    """
    out, target = Path(out), Path(target)
    if target.suffix != ".npz":
        raise ValueError(f"npz must end in .npz, got {str(target)!r}")
    if target.resolve().parent == out.resolve():
        raise ValueError(f"npz must lie outside the folder of shards {out}, got {target}")
    manifest = verify(out)
    labels = []
    with atomic_write(target) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(manifest["shape"])}
            np.lib.format.write_array_header_1_0(entry, header)
            for shard in manifest["shards"]:
                arrays, _ = load_arrays(out / shard["name"])
                entry.write(np.ascontiguousarray(arrays["arr_0"]).data)
                labels.append(arrays["labels"])
        with archive.open("labels.npy", "w") as entry:
            np.lib.format.write_array(entry, np.concatenate(labels))
        for name in (NOT_FINITE, CLASS_NAMES):
            if name in manifest:
                with archive.open(f"{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, np.array(manifest[name]))
    return manifest


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and settings of a shard."""
    arrays, description = load_arrays(path)
    if description.get("kind") != "images" or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no shard of images of this version")
    return arrays, description["settings"]


def _manifest_of(out: Path) -> dict[str, Any]:
    """The manifest of the shards in a folder, computed by reading them.

    Raises CheckpointError unless they hold every image once, in order, with the same settings.
    """
    pixels, shards, num = hashlib.sha256(), [], 0
    marked: list[int] = []
    names: list[str] = []
    settings: dict[str, Any] | None = None
    shape: tuple[int, ...] = ()
    for path in sorted(out.glob("images-*.npz")):
        arrays, shard_settings = _load(path)
        images, labels, indices = (arrays[name] for name in ("arr_0", "labels", "indices"))
        if not np.array_equal(indices, np.arange(num, num + len(images))) or len(labels) != len(
            images
        ):
            raise CheckpointError(
                f"{path} must go on with image {num}, got {indices[0]} to {indices[-1]}: images "
                "are missing or twice"
            )
        if settings is not None and (changed := difference(settings, shard_settings)):
            raise CheckpointError(f"{path} is of another set than the shards before it: {changed}")
        settings, shape = shard_settings, images.shape[1:]
        pixels.update(np.ascontiguousarray(images).data)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"name": path.name, "first": num, "count": len(images), "sha256": digest})
        marked += arrays[NOT_FINITE].tolist() if NOT_FINITE in arrays else []
        names = arrays[CLASS_NAMES].tolist() if CLASS_NAMES in arrays else []
        num += len(images)
    if settings is None or num != settings["num"]:
        raise CheckpointError(
            f"{out} holds {num} images of {settings['num'] if settings else 'none'}"
        )
    return {
        "kind": "images",
        "format": FORMAT,
        "shape": [num, *shape],
        "first": 0,
        "last": num - 1,
        "images_sha256": pixels.hexdigest(),
        "settings": settings,
        **({NOT_FINITE: marked} if marked else {}),
        **({CLASS_NAMES: names} if names else {}),
        "shards": shards,
    }
