"""Names that file systems allow: long ones, links, and a home that is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowturbo.cli.output import names_a_folder
from flowturbo.storage.files import atomic_write, temporary_prefix, user_path
from flowturbo_kernels import _cache


@pytest.mark.parametrize(
    "name", ["n" * 251 + ".png", "h\u00f6" * 80 + ".png", "\u732b" * 83 + ".png"]
)
def test_a_name_of_as_many_bytes_as_are_allowed(tmp_path, name):
    assert len(os.fsencode(name)) <= 255
    with atomic_write(tmp_path / name) as file:
        file.write(b"whole")
    assert (tmp_path / name).read_bytes() == b"whole"
    assert os.listdir(tmp_path) == [name]
    assert len(os.fsencode(temporary_prefix(name))) <= 220


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path):
    target, link = tmp_path / "disk" / "real.png", tmp_path / "link.png"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    with pytest.raises(TypeError), atomic_write(link) as file:
        file.write("half way")  # type: ignore[arg-type]
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["real.png"]
    dangling = tmp_path / "dangling.png"
    dangling.symlink_to("later.png")
    with atomic_write(dangling) as file:
        file.write(b"made")
    assert (tmp_path / "later.png").read_bytes() == b"made"


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know, as in many containers."""

    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FLOWTURBO_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", no_home)


def test_without_a_home_the_cache_is_among_temporary_files(homeless, monkeypatch, tmp_path):
    monkeypatch.setattr(_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert _cache.cache_folder().parent == tmp_path
    with pytest.raises(ValueError, match=r"'~/model.pt' begins at a home folder.*set HOME"):
        user_path("~/model.pt")


def test_compilers_cache_where_they_can(monkeypatch, tmp_path):
    home, given = tmp_path / "home", tmp_path / "given"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setattr(_cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    writable = True
    monkeypatch.setattr(_cache.os, "access", lambda *_: writable)
    names = "TRITON_CACHE_DIR", "CUPY_CACHE_DIR"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    _cache.give_compilers_a_cache()
    assert not any(name in os.environ for name in names)
    elsewhere = tmp_path / "elsewhere"  # Triton's alone
    monkeypatch.setenv("TRITON_HOME", str(elsewhere))
    monkeypatch.setattr(_cache.os, "access", lambda path, _: path != elsewhere)
    _cache.give_compilers_a_cache()
    assert "TRITON_CACHE_DIR" in os.environ
    assert "CUPY_CACHE_DIR" not in os.environ
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(_cache.os, "access", lambda *_: writable)
    writable = False
    monkeypatch.setenv("CUPY_CACHE_DIR", str(given))
    _cache.give_compilers_a_cache()
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(tmp_path / "temporary")
    assert os.environ["CUPY_CACHE_DIR"] == str(given)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("SiT-XL-2-cfg-1.5-ODE-50-heun", True),
        ("cfg1.5", True),
        ("set", True),
        ("v1.0-final", True),
        ("picture.gif", False),
        ("picture.jpeg", False),
        ("a.PNG", False),
        ("film.mp4", False),
    ],
)
def test_names_of_folders_may_have_dots(name, folder):
    assert names_a_folder(Path(name)) is folder
