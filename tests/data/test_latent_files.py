"""Latents from files: the same from every kind, and refused unless whole."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import latents_of, random_latents, shard
from torch import Tensor

from flowturbo.data.latents import Latents, load_data, needs_vae
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage.files import CheckpointError, save_tensors


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latents": torch.zeros(9, 4, 4)}, r"\(N, C, H, W\)"),
        ({"latents": torch.zeros(0, 2, 4, 4)}, "N at least 1"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "9 whole numbers"),
        ({"labels": torch.zeros(9)}, "whole numbers"),
        ({"labels": -torch.ones(9, dtype=torch.int64)}, "from 0 on"),
        ({"std": torch.zeros(9, 2, 4, 5)}, "std must have the latents' shape"),
        (
            {"latents_flipped": torch.zeros(8, 2, 4, 4)},
            "latents_flipped must have the latents' shape",
        ),
        ({"std_flipped": None}, "std_flipped must come with"),
        ({"std": None}, "std_flipped must come with"),
        ({"latents_flipped": None}, "std_flipped must come with"),
        ({"latents": torch.full((9, 2, 4, 4), torch.nan)}, "latents must be finite"),
        ({"std_flipped": torch.full((9, 2, 4, 4), torch.inf)}, "std_flipped must be finite"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    change: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    parts = {
        name: values for name, values in (random_latents(3) | change).items() if values is not None
    }
    with pytest.raises(ValueError, match=words):
        latents_of(parts)
    np.savez(tmp_path / "a.npz", **{name: values.numpy() for name, values in parts.items()})
    with pytest.raises(CheckpointError, match=rf"a\.npz.*{words}"):
        load_data(tmp_path / "a.npz")


def same(a: Latents, b: Latents) -> bool:
    draws = [StepRandom(0, 0, range(40)) for _ in (a, b)]
    indices = np.arange(40) % len(a)
    (x, y), (u, v) = a.batch(indices, draws[0]), b.batch(indices, draws[1])
    return torch.equal(x, u) and torch.equal(y, v) and a.num_classes == b.num_classes


@pytest.mark.parametrize(
    "names", [("latents", "labels"), ("latents", "labels", "std"), tuple(random_latents(0))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_latents_from_npz_shards_and_memory(
    tmp_path: Path, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    parts = {
        name: values for name, values in random_latents(4, dtype=dtype).items() if name in names
    }
    np.savez(
        tmp_path / "a.npz",
        other=np.zeros(3),
        **{name: values.numpy() for name, values in parts.items()},
    )
    for k, rows in enumerate((slice(0, 4), slice(4, 5), slice(5, 9))):
        shard = {name: values[rows] for name, values in parts.items()} | {
            "other": torch.zeros(k + 1)
        }
        save_tensors(tmp_path / "shards" / f"{k}.safetensors", shard, {})
    (tmp_path / "shards" / "._0.safetensors").write_bytes(b"what a Mac leaves beside files")
    expected = latents_of(parts)
    for source in (tmp_path / "a.npz", str(tmp_path / "a.npz"), tmp_path / "shards"):
        got = load_data(source)
        assert isinstance(got, Latents)
        assert same(got, expected)
        assert got.mean.dtype == dtype
        assert not needs_vae(source)


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_npz_files_are_never_unpickled_and_damage_is_named(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    objects = np.empty(1, dtype=object)
    objects[0] = Canary(canary)
    np.savez(tmp_path / "objects.npz", latents=objects, labels=np.zeros(1, dtype=np.int64))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Canary(canary)))
    good = {name: values.numpy() for name, values in random_latents(5).items()}
    np.savez(tmp_path / "good.npz", **good)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(content[:-300])
    (tmp_path / "flipped.npz").write_bytes(
        content[:500] + bytes([content[500] ^ 1]) + content[501:]
    )
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "text.npz", latents=np.array(["a"]), labels=np.zeros(1, dtype=np.int64))
    for name in ("objects", "pickle", "truncated", "flipped", "images", "text", "none"):
        with pytest.raises(CheckpointError, match=rf"{name}\.npz"):
            load_data(tmp_path / f"{name}.npz")
    assert not canary.exists()
    with pytest.raises(CheckpointError, match="got arr_0"):
        load_data(tmp_path / "images.npz")


def test_shards_that_do_not_belong_together_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"vae": "a"}
    first = {"kind": "latents", "settings": settings, "shards": 2, "shard": 0, "num_classes": 9}
    wide = {
        name: torch.zeros(3, 2, 6, 6)
        for name in ("latents", "std", "latents_flipped", "std_flipped")
    }
    for n, (arguments, words) in enumerate(
        (
            (
                dict(drop=("std", "std_flipped")),
                "b.safetensors holds labels, latents, latents_flipped with",
            ),
            (dict(drop=("latents_flipped", "std_flipped")), "b.safetensors holds"),
            (dict(drop=("labels",)), "b.safetensors must hold 'latents' and 'labels'"),
            (dict(drop=("latents",)), "b.safetensors must hold 'latents' and 'labels'"),
            (
                dict(change=wide),
                r"b.safetensors holds .* \(2, 6, 6\), but a.safetensors holds .* \(2, 4, 4\)",
            ),
            (
                dict(change={"labels": torch.zeros(2, dtype=torch.int64)}),
                "b.safetensors: labels must be 3 whole",
            ),
            (
                dict(change={"labels": torch.full((3,), 9)}),
                "b.safetensors: labels must be below 9, got 9",
            ),
            (
                dict(settings={"vae": "b"}),
                "b.safetensors and a.safetensors are not of one set: they differ in settings",
            ),
            (dict(kind="weights"), "not of one set: they differ in kind"),
            (dict(num_classes=8), "not of one set: they differ in num_classes"),
            (dict(shards=3), "not of one set: they differ in shards"),
            (dict(shard=0), "shards 1 of 2 are missing"),
        )
    ):
        place = tmp_path / str(n)
        shard(place / "a.safetensors", **first)  # type: ignore[arg-type]
        shard(place / "b.safetensors", **(first | {"shard": 1} | arguments))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=words):
            load_data(place)
    whole = tmp_path / "whole"
    shard(whole / "a.safetensors", **first)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="shards 1 of 2 are missing"):
        load_data(whole)
    shard(whole / "b.safetensors", **(first | {"shard": 1}))  # type: ignore[arg-type]
    assert load_data(whole).num_classes == 9
    shard(whole / "c.safetensors", **(first | {"shard": 1}))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="twice"):
        load_data(whole)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.safetensors")
    path = tmp_path / "b.safetensors"
    content = path.read_bytes()
    load_data(tmp_path)
    for damaged in (
        content[:-1],
        content[:-40] + bytes([content[-40] ^ 4]) + content[-39:],
        b"",
        content[:100],
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"b\.safetensors"):
            load_data(tmp_path)
