"""Packages of npm, fetched by npm itself and read without unpacking: their content is data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..storage.files import CheckpointError


@dataclass(frozen=True)
class Package:
    """One version of a package, with the digest of the file that `npm pack` writes."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file(self) -> str:
        """What npm calls the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def given(package: Package, folder: Path) -> Path:
    """The package's file in a folder of files that `npm pack` wrote.

    ValueError if there is none, CheckpointError if it is another file.
    """
    path = folder / package.file
    if not path.is_file():
        raise ValueError(
            f"packages must be a folder that holds {package.file}, but {folder} does not: "
            f"`npm pack {package.spec}` writes it"
        )
    _check_digest(path, package)
    return path


def fetched(package: Package, folder: Path) -> Path:
    """The package's file in a folder, brought there by `npm pack` unless it is there and whole.

    npm takes it from the registry that it is configured for. The file appears under its name when
    it is whole. No other process may be fetching into the folder. ValueError without npm,
    RuntimeError if npm fails, CheckpointError if it brings another file.
    """
    path = folder / package.file
    if path.is_file() and _digest(path) == package.sha256:
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"{package.spec} is fetched by npm, and there is none: install Node.js, or run `npm "
            f"pack {package.spec}` elsewhere and give --packages the folder that holds its file"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PARTIAL}*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PARTIAL) as work:
        done = subprocess.run(
            [npm, "pack", package.spec, "--ignore-scripts"],
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(
                f"`npm pack {package.spec}` failed: {' | '.join(lines[:4]) or done.returncode}"
            )
        brought = Path(work) / package.file
        if not brought.is_file():
            names = ", ".join(sorted(os.listdir(work))[:4])
            raise RuntimeError(
                f"`npm pack {package.spec}` wrote {names or 'nothing'}, not {package.file}"
            )
        _check_digest(brought, package)
        os.replace(brought, path)
    return path


_PARTIAL = ".npm-pack-"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        hashed = hashlib.sha256()
        while piece := file.read(1 << 22):
            hashed.update(piece)
    return hashed.hexdigest()


def _check_digest(path: Path, package: Package) -> None:
    if (digest := _digest(path)) == package.sha256:
        return
    try:
        says = f", and says that it is {_stated(path, _contents(path, (_ABOUT,)))}"
    except CheckpointError:
        says = ""
    raise CheckpointError(
        f"{path} must be {package.spec} with SHA-256 {package.sha256}, but has {digest}{says}"
    )


def read(path: Path, package: Package, *folders: str) -> dict[str, bytes]:
    """The files below these folders, or of these names, in the package's file: name to content.

    They are read into memory and nothing is unpacked, so names such as "../x" do no harm.
    CheckpointError for a damaged file, and for a package of another name or version.
    """
    files = _contents(path, (_ABOUT, *folders))
    if (stated := _stated(path, files)) != package.spec:
        raise CheckpointError(f"{path} must be {package.spec}, but says that it is {stated}")
    return files


_ABOUT = "package/package.json"
_MOST = 1 << 24  # bytes of one file: far more than any that is read


def _contents(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(names) and member.size <= _MOST:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    files[member.name] = content.read()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{path} is no whole npm package: {error}") from error
    return files


def _stated(path: Path, files: Mapping[str, bytes]) -> str:
    """The name and version in a package's package.json, as in `Package.spec`."""
    try:
        about = json.loads(files[_ABOUT])
        return f"{about['name']:.60}@{about['version']:.60}"
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is no npm package: {_ABOUT} in it states no name and version"
        ) from None
