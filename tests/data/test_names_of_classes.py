"""The names of the classes, from every source that has them."""

from pathlib import Path

import numpy as np
import pytest
from encoding import Halved
from latent_files import random_latents, shard

from flowturbo.data.encode import Encode, encode
from flowturbo.data.latents import ImageFolder, Latents, digits, load_data
from flowturbo.storage.files import CheckpointError

NAMES = ["bear", "Katze", "chat", "猫", "cat-3d", "cat 6"]


def save(path: Path, names: object) -> Path:
    """Latents of classes 0 to 4, with these names."""
    arrays = {name: values.numpy() for name, values in random_latents(3).items()}
    arrays["labels"] = np.arange(9) % 5
    np.savez(path, **arrays, class_names=np.asarray(names))
    return path


def test_names_are_read_from_an_npz(tmp_path: Path) -> None:
    data = load_data(save(tmp_path / "a.npz", NAMES))
    assert data.class_names == tuple(NAMES)
    assert data.num_classes == 6  # as many as there are names, though no label is 5


def test_names_of_a_folder_and_of_its_shards_are_those_of_its_folders(
    folder: Path, tmp_path: Path, halved: Halved
) -> None:
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    assert len(names) == 3
    assert ImageFolder(folder, halved, 8).class_names == names
    out = encode(
        Encode(folder, tmp_path / "out", vae="x", image_size=8, shard_size=4, device="cpu")
    )
    assert load_data(out).class_names == names


def test_without_names_there_are_none(tmp_path: Path) -> None:
    parts = {name: values.numpy() for name, values in random_latents(3).items()}
    np.savez(tmp_path / "a.npz", **parts)
    shard(tmp_path / "shards" / "a.safetensors")
    shard(tmp_path / "of_npz" / "a.safetensors", settings={"classes": None}, num_classes=9)
    for name in ("a.npz", "shards", "of_npz"):
        assert load_data(tmp_path / name).class_names is None
    assert digits().class_names is None


@pytest.mark.parametrize(
    "names, words",
    [
        (["a", "b", "c", "d"], "labels must be below 4, got 4"),
        (["a", "b", "c", "d", "a"], "different, got 'a' more than once"),
        (["a", "b", "c", "d", " "], "not blank, got ' '"),
        ([], r"\(K,\) of texts, got \(0,\), float64"),
        (np.array([], dtype="U1"), "at least one, one a class, got 0"),
        (np.zeros(5), r"\(K,\) of texts, got \(5,\), float64"),
        ([b"a", b"b", b"c", b"d", b"e"], r"\(K,\) of texts, got \(5,\), \|S1"),
        ([["a", "b", "c", "d", "e"]], r"\(K,\) of texts, got \(1, 5\)"),
        ("abcde", r"\(K,\) of texts, got \(\)"),
        (np.array(["a", "b", "c", "d", "e"], dtype=object), "pickled"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, names: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.npz.*{words}"):
        load_data(save(tmp_path / "a.npz", names))


def test_names_in_memory_are_checked_as_well() -> None:
    parts = random_latents(3)
    latents, labels = parts["latents"], parts["labels"]
    assert Latents(latents, labels, class_names=NAMES).class_names == tuple(NAMES)
    with pytest.raises(ValueError, match="class_names must be 7, one a class, got 6"):
        Latents(latents, labels, num_classes=7, class_names=NAMES)
    with pytest.raises(ValueError, match="not blank, got 1"):
        Latents(latents, labels, class_names=[1, 2, 3, 4, 5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="class_names must be a list of names, got 'abcde'"):
        Latents(latents, labels, class_names="abcde")
