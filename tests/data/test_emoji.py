"""`flowturbo emoji`: the data that it makes of two packages, and what it refuses."""

import io
import json
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emoji_packages import (
    FLUENT,
    NOTO,
    package_files,
    use_npm,
    use_packages,
    write_package,
)
from paths import ROOT
from PIL import Image

from flowturbo.cli.main import main
from flowturbo.data import emoji as module
from flowturbo.data.emoji import Emoji, Recipe, emoji
from flowturbo.data.emoji_classes import CLASS_NAMES, pictures
from flowturbo.data.emoji_sheet import NOTICE
from flowturbo.data.latents import Latents, load_data
from flowturbo.storage.files import CheckpointError

FILES = ["NOTICE.txt", "held-out.npz", "sheet.png", "train.npz"]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of two small packages, which the recipe names."""
    use_packages(monkeypatch, tmp_path / "packages", *package_files())
    return tmp_path / "packages"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def on_white(data: bytes, side: int) -> np.ndarray:
    """A picture in the middle of a white square, (side, side, 3) float64."""
    with Image.open(io.BytesIO(data)) as image:
        rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    opacity = rgba[..., 3:] / 255
    height, width = rgba.shape[:2]
    square = np.full((side, side, 3), 255.0)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgba[..., :3] * opacity + 255 * (1 - opacity)
    return square


@pytest.mark.parametrize("size, style, bound", [(8, 0, 1), (16, 1, 1)])
def test_the_pictures_are_those_of_the_packages(tmp_path, monkeypatch, size, style, bound):
    """At their own size they are not resized: a blend in float64 gives the same, rounding aside."""
    noto, fluent = package_files(seed=5)
    wide = io.BytesIO()
    rng = np.random.default_rng(6)
    Image.fromarray(rng.integers(0, 256, (8, 16, 4), dtype=np.uint8), "RGBA").save(
        wide, format="WEBP", lossless=True, exact=True
    )
    fluent[f"{FLUENT}1f44b.webp"] = wide.getvalue()  # half as high as it is wide
    use_packages(monkeypatch, tmp_path / "packages", noto, fluent)
    emoji(Emoji(tmp_path / "out", packages=tmp_path / "packages", size=size))
    found = pictures(json.loads(noto["package/emoji.json"]), noto.keys(), fluent.keys())
    left = {p: on_white((noto, fluent)[style][p.member], size) for p in found if p.style == style}
    for part in ("train", "held-out"):
        with np.load(tmp_path / "out" / f"{part}.npz") as arrays:
            data = dict(arrays)
        assert np.array_equal(data["latents_flipped"], data["latents"][..., ::-1])
        ours = data["labels"] % 2 == style
        for latent, label in zip(data["latents"][ours], data["labels"][ours], strict=True):
            levels = (latent.astype(np.float64).transpose(1, 2, 0) + 1) * 127.5
            p = min(
                (p for p in left if p.label == label),
                key=lambda p: float(np.abs(left[p] - levels).max()),
            )
            assert np.abs(left.pop(p) - levels).max() <= bound
    assert not left  # each picture once


def test_the_data_are_read_with_their_classes(tmp_path, packages):
    emoji(Emoji(tmp_path / "out", packages=packages))
    train, held_out = (load_data(tmp_path / "out" / f"{p}.npz") for p in ("train", "held-out"))
    assert isinstance(train, Latents)
    assert isinstance(held_out, Latents)
    assert train.shape == held_out.shape == (3, 32, 32)
    assert train.num_classes == held_out.num_classes == 42
    assert train.class_names == held_out.class_names == CLASS_NAMES
    # Five emoji of each kind, in two styles, one of them held out; two cooks and a wave, in tones.
    counts = np.bincount(train.labels, minlength=42) + np.bincount(held_out.labels, minlength=42)
    expected = dict.fromkeys(CLASS_NAMES, 5) | {"person": 11, "person-3d": 11}
    assert dict(zip(CLASS_NAMES, counts.tolist(), strict=True)) == expected | {
        "hand": 8,
        "hand-3d": 8,
    }
    assert set(held_out.labels.tolist()) == set(range(42))


def test_equal_packages_give_equal_files(tmp_path, packages, monkeypatch):
    """From a folder or by npm, and a second time."""
    use_npm(monkeypatch, packages)
    first = emoji(Emoji(tmp_path / "a", packages=packages))
    assert emoji(Emoji(tmp_path / "b")) == first
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert sorted(a) == FILES
    assert a == b
    assert sorted(contents(tmp_path / "b" / "packages")) == sorted(contents(packages))
    use_npm(monkeypatch, packages, "exit 1")  # no longer needed
    assert emoji(Emoji(tmp_path / "b")) == first
    assert contents(tmp_path / "b") == b


def test_the_command_says_what_it_made(tmp_path, packages, capsys):
    words = ["emoji", "--out", str(tmp_path / "out"), "--packages", str(packages), "--size", "16"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "| hand | " in said
    assert "No digest is recorded" in said
    assert load_data(tmp_path / "out" / "train.npz").shape == (3, 16, 16)


def recorded(recipe: Recipe, said: str) -> Recipe:
    """The recipe with the digests that the command printed."""
    digests = {
        line.split()[2].rstrip(":"): line.split()[-1]
        for line in said.splitlines()
        if line.startswith("SHA-256 of")
    }
    return replace(recipe, digests={32: digests})


def test_pictures_are_compared_with_the_recorded_digest(tmp_path, packages, monkeypatch):
    said = emoji(Emoji(tmp_path / "a", packages=packages))
    recipe = recorded(module.RECIPE, said)
    monkeypatch.setattr(module, "RECIPE", recipe)
    assert "These are the recorded digests" in emoji(Emoji(tmp_path / "a", packages=packages))
    other = recipe.digests[32] | {"held-out": "0" * 64}
    monkeypatch.setattr(module, "RECIPE", replace(recipe, digests={32: other}))
    with pytest.raises(ValueError, match=r"pictures of held-out differ .* --no-check"):
        emoji(Emoji(tmp_path / "b", packages=packages))
    assert not (tmp_path / "b").exists()
    assert "differ" in emoji(Emoji(tmp_path / "b", packages=packages, check=False))
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_an_interrupted_writing_is_resumed(tmp_path, packages, monkeypatch, count):
    """The files that are there are whole; the same command makes the others."""
    emoji(Emoji(tmp_path / "a", packages=packages, size=8))
    done = 0

    def stop(source: str, target: str) -> None:
        nonlocal done
        done += 1
        if done == count:
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            emoji(Emoji(tmp_path / "b", packages=packages, size=8))
    whole, partial = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert len(partial) == count - 1
    assert all(whole[name] == partial[name] for name in partial)
    (tmp_path / "b" / ".train.npz.abc.tmp").write_bytes(b"left by a process that was killed")
    emoji(Emoji(tmp_path / "b", packages=packages, size=8))
    assert contents(tmp_path / "b") == whole


def test_other_data_are_not_overwritten(tmp_path, packages):
    out = tmp_path / "out"
    emoji(Emoji(out, packages=packages))
    before = contents(out)
    with pytest.raises(ValueError, match="size was 32 and is now 16"):
        emoji(Emoji(out, packages=packages, size=16))
    assert contents(out) == before
    np.savez(out / "held-out.npz", latents=np.zeros(3))
    with pytest.raises(ValueError, match=r"held-out\.npz .* choose another folder"):
        emoji(Emoji(out, packages=packages))
    with pytest.raises(ValueError, match="out must be a folder"):
        emoji(Emoji(out / "train.npz", packages=packages))
    with pytest.raises(ValueError, match=r"size must be at most 256, .* got 257"):
        Emoji(out, size=257)


def test_wrong_packages_are_refused(tmp_path, monkeypatch):
    """Another digest, another version, no package at all; nothing is written then."""
    folder, (noto, fluent) = tmp_path / "packages", package_files()
    recipe = use_packages(monkeypatch, folder, noto, fluent)
    out = Emoji(tmp_path / "out", packages=folder)
    about = json.dumps({"name": "noto", "version": "1.0.1"}).encode()
    newer = write_package(folder / "noto-1.0.0.tgz", noto | {"package/package.json": about})
    with pytest.raises(
        CheckpointError, match=rf"noto@1\.0\.0 with SHA-256 .*{newer}.*noto@1\.0\.1"
    ):
        emoji(out)
    monkeypatch.setattr(module, "RECIPE", replace(recipe, noto=replace(recipe.noto, sha256=newer)))
    with pytest.raises(CheckpointError, match=r"must be noto@1\.0\.0, but says .*noto@1\.0\.1"):
        emoji(out)
    (folder / "noto-1.0.0.tgz").unlink()
    with pytest.raises(ValueError, match=r"holds noto-1\.0\.0\.tgz.*npm pack noto@1\.0\.0"):
        emoji(out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_damaged_package_is_refused(tmp_path, packages, monkeypatch, share):
    """Though its digest is that of the recipe, so that the reader itself must notice."""
    path = packages / "some-fluent-2.0.0.tgz"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"some-fluent-2\.0\.0\.tgz must be @some/fluent"):
        emoji(Emoji(tmp_path / "out", packages=packages))
    monkeypatch.setattr(module, "_check_unused", lambda *_: None)
    monkeypatch.setattr("flowturbo.data.npm_packages._check_digest", lambda *_: None)
    with pytest.raises(
        CheckpointError, match=r"some-fluent-2\.0\.0\.tgz is no (whole )?npm package"
    ):
        emoji(Emoji(tmp_path / "out", packages=packages))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "package, change, words",
    [
        (0, {f"{NOTO}1f44b.png": None}, r"noto-1\.0\.0\.tgz: .* lacks package/img/.*1f44b\.png"),
        (0, {f"{NOTO}1f44b.png": b"PNG?"}, r"1f44b\.png is no whole picture"),
        (0, {"package/emoji.json": None}, r"holds no table of emoji"),
        (0, {"package/emoji.json": b"[{}]"}, r"holds no table of emoji"),
        (0, {"package/emoji.json": b"["}, r"holds no table of emoji"),
        (0, {"package/package.json": b"{}"}, r"states no name and version"),
        (1, {f"{FLUENT}1f0{c:x}{i}.webp": None for c in (4,) for i in range(5)}, "of cat-3d"),
    ],
)
def test_missing_and_damaged_pictures_are_named(tmp_path, monkeypatch, package, change, words):
    files = package_files()
    for name, content in change.items():
        files[package].pop(name)
        if content is not None:
            files[package][name] = content
    use_packages(monkeypatch, tmp_path / "packages", *files)
    with pytest.raises(CheckpointError, match=words):
        emoji(Emoji(tmp_path / "out", packages=tmp_path / "packages"))
    assert not (tmp_path / "out").exists()


def test_a_style_may_lack_some_pictures(tmp_path, monkeypatch):
    noto, fluent = package_files()
    del fluent[f"{FLUENT}1f44b.webp"]
    use_packages(monkeypatch, tmp_path / "packages", noto, fluent)
    said = emoji(Emoji(tmp_path / "out", packages=tmp_path / "packages"))
    assert "| hand | 7 | 6 | 1 | 1 |" in said


def test_nothing_of_a_package_is_unpacked(tmp_path, packages, monkeypatch):
    """Names that lead out of the folder, links and devices do no harm."""
    path = packages / "some-fluent-2.0.0.tgz"
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"../evil": b"x", "/evil": b"x", f"{FLUENT}../../evil": b"x"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{FLUENT}1f44b.webp")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr("flowturbo.data.npm_packages._check_digest", lambda *_: None)
    emoji(Emoji(tmp_path / "a", packages=packages))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "packages"]
    assert sorted(contents(tmp_path / "a")) == FILES


@pytest.mark.parametrize(
    "script, error, words",
    [
        ("echo 'E404 no such package' >&2; exit 1", RuntimeError, r"noto@1\.0\.0` failed: E404"),
        ("touch other.tgz", RuntimeError, r"wrote other\.tgz, not noto-1\.0\.0\.tgz"),
        ("true", RuntimeError, "wrote nothing"),
        ("echo x > noto-1.0.0.tgz", CheckpointError, r"noto@1\.0\.0 with SHA-256"),
    ],
)
def test_what_npm_fails_to_bring_is_said(tmp_path, packages, monkeypatch, script, error, words):
    use_npm(monkeypatch, packages, script)
    with pytest.raises(error, match=words):
        emoji(Emoji(tmp_path / "out"))
    assert not list((tmp_path / "out" / "packages").iterdir())


def test_without_npm_the_error_says_so(tmp_path, packages, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["emoji", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "there is none" in said
    assert "--packages" in said
    assert not (tmp_path / "out").exists()


def test_a_killed_fetch_is_begun_again(tmp_path, packages, monkeypatch):
    """What it left is removed, and a package that is not whole is fetched anew."""
    use_npm(monkeypatch, packages)
    folder = tmp_path / "out" / "packages"
    (folder / ".npm-pack-abc").mkdir(parents=True)
    (folder / ".npm-pack-abc" / "noto-1.0.0.tgz").write_bytes(b"a part")
    (folder / "noto-1.0.0.tgz").write_bytes(b"another part")
    emoji(Emoji(tmp_path / "out"))
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == ["noto-1.0.0.tgz", "some-fluent-2.0.0.tgz"]


def test_the_notice_is_that_of_the_project():
    assert (ROOT / "NOTICE").read_text(encoding="utf-8") == NOTICE
    for package in (module.RECIPE.noto, module.RECIPE.fluent):
        assert package.spec.replace("@1", " 1") in NOTICE


def test_the_page_has_the_recorded_digests_and_all_classes():
    page = (ROOT / "docs" / "emoji.md").read_text(encoding="utf-8")
    for part, digest in module.RECIPE.digests[32].items():
        assert f"| {part} | `{digest}` |" in page
    rows = re.findall(r"^\| ([\w-]+) \|((?: \d+ \|){4})$", page, re.MULTILINE)
    counts = {kind: [int(n) for n in re.findall(r"\d+", numbers)] for kind, numbers in rows}
    total = np.array(counts.pop("all"))
    assert [kind for kind in counts for _ in range(2)] == [
        name.removesuffix("-3d") for name in CLASS_NAMES
    ]
    assert np.array_equal(sum(map(np.array, counts.values())), total)
    assert f"{total.sum():,} colour pictures" in page
