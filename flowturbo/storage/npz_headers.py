"""The headers of .npz files, read before the arrays: a header that lies must cost no memory."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

# The most that deflate can shrink: 258 equal bytes to two bits, and some for the block's header.
_DEFLATE_RATIO = 1032


def check_headers(path: Path) -> None:
    """Raise ValueError unless every array of an .npz has the bytes that its header promises.

    NumPy makes room for what the header says before it reads. Raises zipfile.BadZipFile for what is
    no zip.
    """
    if not zipfile.is_zipfile(path):  # numpy.load would read a plain array, or a pickle
        raise ValueError("it is no zip file")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                raise ValueError(f"it holds {member.filename[:60]!r}, which is no array")
            check_size(path, member)
            with archive.open(member) as file:
                shape, _, dtype = read_header(file)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename[:60]!r} holds pickled objects")
                expected = file.tell() + math.prod(shape) * dtype.itemsize
            if member.file_size != expected:
                raise ValueError(
                    f"{member.filename[:60]!r} has {member.file_size} bytes, and its header says "
                    f"{expected}"
                )


def check_size(path: Path, member: zipfile.ZipInfo) -> None:
    """Raise ValueError for a member of a zip that can't have the size that the zip says.

    Its compression must be one that NumPy writes.
    """
    most = {
        zipfile.ZIP_STORED: member.compress_size,
        zipfile.ZIP_DEFLATED: _DEFLATE_RATIO * member.compress_size + 64,
    }.get(member.compress_type)
    if most is None:
        raise ValueError(f"{member.filename[:60]!r} is compressed in a way that is not read")
    if member.compress_size > os.path.getsize(path) or not 0 <= member.file_size <= most:
        raise ValueError(f"{member.filename[:60]!r} is said to have {member.file_size} bytes")


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a .npy; the file stands at its data then.

    Raises ValueError for another file.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # zlib's, tokenize's, the syntax tree's and others
        raise ValueError(f"the header of an array can't be read: {error}") from error
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype
