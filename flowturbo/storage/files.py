"""Atomic writes, tensors and arrays with a digest over every byte, and file locks.

A file is either complete or absent. A lock ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .npz_headers import check_headers

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


class CheckpointError(ValueError):
    """A file of weights or tensors that can't be used, and why.

    Functions that read such files raise no other error.
    """


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` when the block ends.

    If the block raises or the process is killed, `path` stays as it was. A link stays a link: the
    file that it leads to is written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=temporary_prefix(path.name), suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def temporary_prefix(name: str) -> str:
    """How the names of temporary files of a file begin: with its own, as far as names may go."""
    return f".{os.fsencode(name)[:200].decode(errors='ignore')}."


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with ~ as the user's home. ValueError if the user has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{str(path)!r} begins at a home folder, and there is none: set HOME, or give the "
            "whole path"
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, as UTF-8.

    What UTF-8 can't hold, of names that are no text, is written as an escape.
    """
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """A report as JSON, whole, or the file as it was."""
    write_text(path, json.dumps(value, indent=1) + "\n")


# The digest is of the whole file with these 64 characters in place of the digest.
_BLANK = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
MARK = "flowturbo"
"""Under which name headers hold the description."""


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors as safetensors, atomically, with a digest that `load_tensors` checks.

    metadata: a description, of values that JSON can hold.
    """
    header = {MARK: json.dumps(dict(metadata), sort_keys=True), "sha256": _BLANK}
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = _ordered(safetensors.torch.save(flat, metadata=header))
    field = data.index(f'"sha256":"{_BLANK}"'.encode(), 0, _header_end(data))
    start = field + len('"sha256":"')
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    with atomic_write(path) as file:
        file.write(data)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and description of a safetensors file.

    The description is None for files that `save_tensors` did not write. Raises CheckpointError for
    a missing or damaged file; in files of `save_tensors` any changed byte is noticed.
    """
    path = _existing(path)
    with _as_checkpoint_error(path, "is no whole safetensors file"):
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        ours = {MARK, "sha256"} & metadata.keys()
        if ours:
            _check_digest(path)
        tensors = safetensors.torch.load_file(path)
        description = json.loads(metadata[MARK]) if ours else None
        if not isinstance(description, dict | None):
            raise ValueError("its description is no mapping")
        return tensors, description


def header_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata in the header of any safetensors file. Raises CheckpointError."""
    path = _existing(path)
    with (
        _as_checkpoint_error(path, "is no whole safetensors file"),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        return dict(file.metadata() or {})


def _check_digest(path: Path) -> None:
    """Hash the file in pieces, with the digest in its header blanked."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = size.to_bytes(8, "little") + file.read(size)
        digest = _DIGEST.search(header)
        if digest is None:
            raise CheckpointError(f"{path} is damaged: its header holds no digest")
        hashed = hashlib.sha256(
            header[: digest.start(1)] + _BLANK.encode() + header[digest.end(1) :]
        )
        while piece := file.read(1 << 22):
            hashed.update(piece)
    if hashed.hexdigest().encode() != digest[1]:
        raise CheckpointError(f"{path} is damaged: its bytes do not match the digest in its header")


def _ordered(data: bytes) -> bytearray:
    """The same file with its metadata sorted.

    safetensors writes metadata in random order, and equal content should give equal bytes.
    """
    end = _header_end(data)
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text + data[end:])


def _header_end(data: bytes | bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


_TAIL = len(_BLANK + '"}')
"""Length of the end of an .npz of `save_arrays`, from the digest on."""


def save_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Write arrays as an .npz, atomically, with a digest that `load_arrays` checks.

    metadata: a description, of values that JSON can hold.
    Description and digest are the comment of the zip file, which readers of .npz files ignore.
    Equal content gives equal bytes. Raises ValueError for a description of more than 65,535 bytes.
    """
    comment = json.dumps(
        {MARK: dict(metadata), "sha256": _BLANK}, sort_keys=True, separators=(",", ":")
    ).encode()
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise ValueError(
            f"the description of {path} must fit into {zipfile.ZIP_MAX_COMMENT} bytes, got "
            f"{len(comment)}"
        )
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = comment
    data = buffer.getbuffer()
    data[-_TAIL : len(data) - 2] = hashlib.sha256(data).hexdigest().encode()
    with atomic_write(path) as file:
        file.write(data)


def load_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and description of an .npz that `save_arrays` wrote.

    Raises CheckpointError for other files, and for files of which any byte has changed.
    """
    path = _existing(path)
    with _as_checkpoint_error(path, "is no whole .npz with a digest"):
        data = path.read_bytes()
        if (
            hashlib.sha256(data[:-_TAIL] + (_BLANK + '"}').encode()).hexdigest().encode()
            != data[-_TAIL:-2]
        ):
            raise CheckpointError(
                f"{path} is damaged: its bytes do not match the digest at its end"
            )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            description = json.loads(archive.comment)[MARK]
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays), description


@contextlib.contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of any .npz by name, each read on access.

    Raises CheckpointError for a missing or damaged file and for one that holds pickles. Errors that
    the block raises while it reads become CheckpointErrors too.
    """
    path = _existing(path)
    with _as_checkpoint_error(path, "is no whole .npz of plain arrays"):
        check_headers(path)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays


class Lock:
    """A file lock between processes.

    It works on one machine, and on several if the file system supports locks. Closing it or ending
    the process, in whatever way, releases it. Where there are no locks, `take` always succeeds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "ab")  # noqa: SIM115

    def take(self, *, alone: bool) -> bool:
        """Try to take the lock, without waiting -> whether that succeeded.

        alone: True: exclusive; False: shared with others. A lock that is held already is converted.
        """
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Release the lock."""
        self._file.close()


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """The content of a .pt or .pth file, read with weights_only.

    Only tensors, containers and argparse.Namespace are unpickled. Raises CheckpointError for a
    missing, damaged or unsafe file. Damage is found by the checksums in the zip that torch writes;
    files in torch's format before 1.6 have none.
    """
    path = _existing(path)
    with _as_checkpoint_error(path, "is no whole torch file of plain tensors"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch compresses nothing; what is small here could be endless there.
                packed = [i for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
                if packed:
                    raise CheckpointError(
                        f"{path} is no file of torch.save: its part {packed[0].filename[:60]!r} is "
                        "compressed"
                    )
                bad = archive.testzip()
            if bad is not None:
                raise CheckpointError(
                    f"{path} is damaged: the checksum of its part {bad} does not match"
                )
        with (
            torch.serialization.safe_globals([Namespace]),
            _Bounded(io.FileIO(path)) as file,
        ):
            zipped = file.peek(4)[:4] == b"PK\x03\x04"
            return torch.load(path if zipped else file, map_location="cpu", weights_only=True)


class _Bounded(io.BufferedReader):
    """A file from which no more is asked than it has.

    Python makes room for what is asked, and a length in a pickle may lie.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 1 << 16:
            size = min(size, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(size)


def _existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file. CheckpointError if there is none."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {problem}")
    return path


@contextlib.contextmanager
def _as_checkpoint_error(path: Path, problem: str) -> Iterator[None]:
    """Turn the errors of readers, which have many types, into CheckpointError."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{path} {problem}: {_reason(error)}") from error


_GLOBAL = re.compile(r"GLOBAL (\S+)")


def _reason(error: Exception) -> str:
    """The message of an error, as one printable line.

    torch's advice to load a refused pickle unsafely is left out.
    """
    text = str(error)
    if name := _GLOBAL.search(text):
        return (
            f"it asks for {name[1]}, which is not unpickled; if you trust the file, load it "
            "yourself once and save its state dict alone with torch.save"
        )
    if "weights_only" in text:
        return "it holds something other than plain tensors"
    line = (text.strip().split("\n")[0] or type(error).__name__)[:300]
    return "".join(c for c in line if c.isprintable())
