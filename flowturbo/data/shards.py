"""Shards of latents: which files of a folder they are, and whether they form one complete set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.files import CheckpointError
from ..storage.folders import EXTENSIONS, files_below, suffix


def shards_of(folder: Path) -> list[Path]:
    """The .safetensors files of a folder, sorted by name, without hidden ones."""
    return sorted(
        path
        for path in folder.iterdir()
        if suffix(path.name) == ".safetensors" and not path.name.startswith(".")
    )


def check_no_images(folder: Path) -> None:
    """ValueError for a folder of shards in which there are images too."""
    images = [name for name in files_below(folder) if suffix(name) in EXTENSIONS]
    if images:
        raise ValueError(
            f"data must be shards or images, but {folder} holds shards and {len(images)} images, "
            f"the first {images[0]}: move one of the two away"
        )


def check_set(descriptions: Mapping[Path, Mapping[str, Any] | None]) -> int | None:
    """Check that shards form one complete set; returns its number of classes, None if not stated.

    descriptions: path -> the description in the file's header, None where there is none.
    CheckpointError for shards of different sets, and for missing or duplicate ones.
    """
    (first, described), *others = descriptions.items()
    for path, other in others:
        differing = [k for k in _OF_A_SET if (described or {}).get(k) != (other or {}).get(k)]
        if differing:
            raise CheckpointError(
                f"{path} and {first.name} are not of one set: they differ in {', '.join(differing)}"
            )
    if described is None:
        return None
    if "shards" in described:
        numbers = {int((d or {}).get("shard", -1)) for d in descriptions.values()}
        missing = sorted(set(range(int(described["shards"]))) - numbers)
        if missing or len(numbers) != len(descriptions):
            problem = (
                f"shards {', '.join(map(str, missing[:8]))} of {described['shards']} are missing"
                if missing
                else "some shards are there twice"
            )
            raise CheckpointError(
                f"{first.parent} is not a complete set of shards: {problem} (run `flowturbo "
                "encode` again to resume)"
            )
    classes = described.get("num_classes")
    return None if classes is None else int(classes)


_OF_A_SET = ("kind", "settings", "shards", "num_classes")


def classes_of(description: Mapping[str, Any] | None) -> list[str] | None:
    """The names of the classes, if the description of a shard states them."""
    settings = (description or {}).get("settings")
    return settings.get("classes") if isinstance(settings, Mapping) else None
