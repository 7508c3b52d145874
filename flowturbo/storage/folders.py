"""Which files of a folder are its images: one rule for training, encoding and evaluation.

Files of sub-folders count, links are followed, and hidden files are left out. Whatever else can't
be read is refused, and files of other kinds are counted in a warning.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .files import CheckpointError
from .text import file_name

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Images of other kinds, which someone who has them in a folder expects to be read.
_NOT_READ = (
    ".apng .avif .cr2 .dng .exr .gif .hdr .heic .heif .ico .j2k .jfif .jp2 .jpe .jxl .nef .pbm .pcx"
    " .pgm .pnm .ppm .psd .svg .tga .tif .tiff"
)


def suffix(name: str) -> str:
    """The suffix of a file's name in lower case."""
    return os.path.splitext(name)[1].lower()


def files_below(root: Path) -> list[str]:
    """The names of all visible files below a folder, as "folder/file", in order of their parts.

    Raises CheckpointError, naming the path, for a link that leads nowhere or back to a folder above
    it, for what is neither file nor folder, and for a folder that can't be read.
    """
    with _readable(root):
        return list(_walk(root, "", frozenset([_identity(root)])))


def sub_folders(root: Path) -> list[str]:
    """The names of the visible folders in a folder, in order."""
    with _readable(root), os.scandir(root) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return sorted(map(file_name, names))


def images_among(root: Path, names: Sequence[str], used: Collection[str] = ()) -> list[str]:
    """The images among the files of a folder, by their suffixes.

    used: other files that the caller reads. A warning counts the files that are neither. ValueError
    for images of kinds that are not read.
    """
    unread_kinds = frozenset(_NOT_READ.split())
    unread = [name for name in names if suffix(name) in unread_kinds]
    if unread:
        raise ValueError(
            f"{root} holds {_counted(unread)} of kinds that are not read, the first {unread[0]}: "
            f"convert them ({', '.join(EXTENSIONS)} are read), or move them away"
        )
    images = [name for name in names if suffix(name) in EXTENSIONS]
    known = set(used)
    others = [name for name in names if suffix(name) not in EXTENSIONS and name not in known]
    warn_of_others(root, others)
    return images


def warn_of_others(root: Path, others: Sequence[str]) -> None:
    """Say how many files of a folder are left out, and of which kinds."""
    if others:
        warnings.warn(
            f"{root}: {_counted(others)} left out, the first {others[0]}: they are no images "
            f"({', '.join(EXTENSIONS)})",
            stacklevel=2,
        )


def _counted(names: Sequence[str]) -> str:
    kinds = Counter(suffix(name) or "no suffix" for name in names)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())[:8])
    return f"{len(names)} file{'s' if len(names) > 1 else ''} ({listed})"


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """above: the identities of this folder and of those above it, so that a cycle ends."""
    with os.scandir(folder) as opened:
        entries = sorted(
            ((file_name(e.name), e) for e in opened if not e.name.startswith(".")),
            key=lambda pair: pair[0],
        )
    for name, entry in entries:
        if entry.is_file():
            yield prefix + name
        elif entry.is_dir():
            identity = _identity(Path(entry.path))
            if identity in above:
                raise CheckpointError(
                    f"{entry.path} is a link to a folder above it: remove the link"
                )
            yield from _walk(Path(entry.path), f"{prefix}{name}/", above | {identity})
        elif entry.is_symlink():
            raise CheckpointError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist"
            )
        else:
            raise CheckpointError(f"{entry.path} is neither a file nor a folder")


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turn the system's errors into CheckpointError."""
    try:
        yield
    except OSError as error:
        where = error.filename or root
        raise CheckpointError(f"{where} can't be read: {error.strerror or error}") from error
