"""Folders of images: every file is read, counted or refused, alike for training, encoding and
evaluation.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from smooth_images import pixels

from flowturbo.data.encode import Encode, encode
from flowturbo.data.latents import load_data
from flowturbo.data.prompt_latents import load_prompts
from flowturbo.evaluation.image_sets import Files, open_images
from flowturbo.models.vae import Pixels
from flowturbo.storage.files import CheckpointError
from flowturbo.storage.images import scan, scan_captions

NAMES = ["a/1.png", "a/deep/2.PNG", "a/deep/er/3.bmp", "b/1.png"]


def put(root: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(k, 8, 8)).save(root / name, root.joinpath(name).suffix[1:].upper())
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "images", *NAMES)


def captioned(root: Path) -> list[str]:
    for name in NAMES:
        (root / name).with_suffix(".txt").write_text(name, encoding="utf-8")
    return scan_captions(root).names


def evaluated(root: Path) -> list[str]:
    images = open_images(root, "samples")
    assert isinstance(images, Files)
    return images.names


def encoded(root: Path) -> list[str]:
    encode(Encode(root, root.parent / "out", "pixels", image_size=8, device="cpu"))
    return list(scan(root).names)


READERS: dict[str, Callable[[Path], list[str]]] = {
    "training": lambda root: load_data(root, Pixels(), 8).files.names,  # type: ignore[attr-defined]
    "encoding": encoded,
    "captions": captioned,
    "evaluation": evaluated,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_images_of_deeper_folders_and_behind_links_count(
    read: Callable[[Path], list[str]], folder: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        assert read(folder) == NAMES
    put(tmp_path, "elsewhere/5.png", "elsewhere/in/6.png", "7.png")
    (folder / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "7.png").symlink_to(tmp_path / "7.png")
    (tmp_path / "link").symlink_to(folder)
    if read is not captioned:
        (folder / ".hidden").mkdir()
        put(folder, ".hidden/x.png", "a/.y.png", ".z/.t/u.png")
        added = [*NAMES[:3], "a/linked/5.png", "a/linked/in/6.png", "b/1.png", "b/7.png"]
        root = folder if read is encoded else tmp_path / "link"
        if read is encoded:
            for shard in (tmp_path / "out").iterdir():
                shard.unlink()
        assert read(root) == added


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda d: (d / "a" / "x.png").symlink_to("nowhere.png"), r"x\.png is a link to nowhere"),
        (lambda d: (d / "c").symlink_to(d / "none"), r"c is a link to .*none, which does not"),
        (lambda d: (d / "a" / "up").symlink_to(d), "up is a link to a folder above it"),
        (lambda d: (d / "a" / "here").symlink_to("."), "here is a link to a folder above it"),
        (lambda d: (d / "a" / "x.png").symlink_to("x.png"), r"x\.png can't be read: Too many"),
        (lambda d: os.mkfifo(d / "a" / "x.png"), r"x\.png is neither a file nor a folder"),
    ],
)
def test_links_that_lead_nowhere_or_in_circles_are_refused(
    read: Callable[[Path], list[str]], folder: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        read(folder)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", [".tif", ".TIFF", ".gif", ".jfif", ".HEIC", ".avif", ".ppm"])
def test_images_of_kinds_that_are_not_read_are_refused(
    read: Callable[[Path], list[str]], folder: Path, kind: str
) -> None:
    for number in (1, 2):
        (folder / "b" / f"{number}{kind}").write_bytes(b"image")
    said = rf"2 files \(2 \{kind.lower()}\) of kinds that are not read, the first b/1\{kind}"
    with pytest.raises(ValueError, match=said):
        read(folder)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_other_files_are_counted(read: Callable[[Path], list[str]], folder: Path) -> None:
    for name in ("README", "a/notes.md", "a/deep/NOTES.MD", "b/Thumbs.db", "a/.DS_Store"):
        (folder / name).write_bytes(b"text")
    with pytest.warns(
        UserWarning, match=r"4 files \(1 \.db, 2 \.md, 1 no suffix\) left out, the first README"
    ):
        assert read(folder) == NAMES


def test_every_image_is_of_a_class(folder: Path) -> None:
    put(folder, "x.png", "y.png")
    with pytest.raises(ValueError, match=r"images has 2 beside them, the first x\.png"):
        scan(folder)


def test_a_folder_that_can_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def refusing(path: Path | str) -> object:  # a superuser may read everything
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for read in READERS.values():
        with pytest.raises(CheckpointError, match="deep can't be read: Permission denied"):
            read(folder)


def table(root: Path, *rows: tuple[str, str]) -> Path:
    import json

    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def test_the_table_and_the_images_must_be_of_each_other(folder: Path) -> None:
    rows = [(name, f"of {name}") for name in NAMES]
    read = scan_captions(table(folder, *rows[::-1]))
    assert (read.names, read.captions) == (NAMES[::-1], [text for _, text in rows[::-1]])
    with pytest.raises(
        ValueError, match=r"no line for 2 of the 4 images of its folder, the first a/deep/er/3\.bmp"
    ):
        scan_captions(table(folder, *rows[:2]))
    with pytest.raises(ValueError, match=r"line 5: a/gone\.png does not exist"):
        scan_captions(table(folder, *rows, ("a/gone.png", "gone")))
    (folder / "a" / "notes.md").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"line 5: a/notes\.md is of a kind that is not read"):
        scan_captions(table(folder, *rows, ("a/notes.md", "notes")))
    for name in ("a" * 300 + ".png", "a\0.png", "a"):
        with pytest.raises(ValueError, match=r"line 5: .* does not exist"):
            scan_captions(table(folder, *rows, (name, "odd")))
    (folder / "a" / "notes.md").unlink()
    doubled = scan_captions(table(folder, *rows, ("./a/1.png", "another of it")))
    assert len(doubled) == 5


def test_accents_may_be_stored_apart(tmp_path: Path) -> None:
    apart, whole = "e\u0301.png", "\xe9.png"
    for stored, written in ((apart, whole), (whole, apart)):
        root = put(tmp_path / stored, stored)
        assert scan_captions(table(root, (written, "a"))).names == [stored]


def test_a_text_without_an_image_is_counted_and_an_image_without_a_text_is_refused(
    folder: Path,
) -> None:
    captioned(folder)
    (folder / "b" / "of-nothing.txt").write_text("a", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"1 file \(1 \.txt\) left out, the first b/of-nothing"):
        assert scan_captions(folder).names == NAMES
    (folder / "b" / "1.txt").rename(folder / "b" / "1.TXT")
    (folder / "b" / "of-nothing.txt").unlink()
    assert scan_captions(folder).captions[3] == NAMES[3]
    (folder / "b" / "1.TXT").unlink()
    with pytest.raises(ValueError, match=r"b/1\.png has no caption: 1\.txt beside it"):
        scan_captions(folder)


def test_shards_and_images_in_one_folder_are_refused(folder: Path) -> None:
    for name in ("latents-0.SAFETENSORS", "latents-1.safetensors"):
        (folder / name).write_bytes(b"")
        for load in (load_data, load_prompts):
            with pytest.raises(ValueError, match=r"holds shards and 4 images, the first a/1\.png"):
                load(folder)


def test_an_archive_may_have_an_upper_case_suffix(tmp_path: Path) -> None:
    with open(tmp_path / "A.NPZ", "wb") as file:
        np.savez(file, arr_0=np.stack([pixels(0, 8, 8)]))
    assert len(open_images(tmp_path / "A.NPZ", "samples")) == 1
    assert len(open_images(tmp_path, "samples")) == 1
    encode(Encode(tmp_path / "A.NPZ", tmp_path / "out", "pixels", image_size=8, device="cpu"))
