"""Images in .npz files of ADM's layout, read in place, and the digests of such files."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from tqdm.auto import tqdm

from ..storage.files import CheckpointError, open_npz
from ..storage.image_shards import NOT_FINITE
from ..storage.npz_headers import check_size, read_header


class StoredImages:
    """arr_0 (N, height, width, 3) uint8 of an .npz, located but not read.

    shape: (N, height, width, 3). stored: whether it is uncompressed and in C's order, so that
    `rows` can read parts of it. CheckpointError for a file without such images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            with zipfile.ZipFile(path) as archive:
                member = archive.getinfo("arr_0.npy")
                check_size(path, member)
                marked = f"{NOT_FINITE}.npy" in archive.namelist()
                with archive.open(member) as file:
                    self.shape, fortran = _read_header(file)
                    if file.tell() + math.prod(self.shape) != member.file_size:
                        raise ValueError(
                            f"arr_0 has {member.file_size} bytes, and its header says {self.shape}"
                        )
            # In Fortran's order the rows of an image are not together.
            self.stored = member.compress_type == zipfile.ZIP_STORED and not fortran
            if self.stored:  # the values follow the member's zip header and the array's own
                with open(path, "rb") as file:
                    file.seek(member.header_offset + 26)
                    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
                    _read_header(file)
                    self.offset = file.tell()
        except KeyError:
            raise CheckpointError(
                f"{path} has no arr_0, the images (N, height, width, 3) uint8 of ADM's layout"
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # zipfile and its decompressors raise many types
            raise CheckpointError(
                f"{path} is no whole .npz of images: {error or type(error).__name__}"
            ) from error
        if marked:
            with open_npz(path) as arrays:
                numbers = arrays[NOT_FINITE].tolist()
            raise CheckpointError(
                f"{path} has images that are marked as not finite, which would be scored as if "
                f"the model had made them: {', '.join(map(str, numbers[:8]))}"
                f"{' ...' if len(numbers) > 8 else ''}"
            )

    def rows(self, first: int, count: int) -> np.ndarray:
        """Images first .. first + count - 1 of an uncompressed array, read from the file."""
        row = math.prod(self.shape[1:])
        values = np.fromfile(
            self.path, dtype=np.uint8, count=count * row, offset=self.offset + first * row
        )
        return values.reshape(count, *self.shape[1:])


def _read_header(file: IO[bytes]) -> tuple[tuple[int, int, int, int], bool]:
    """Read an array's .npy header; returns its shape, and whether it is in Fortran's order.

    ValueError unless it holds images.
    """
    shape, fortran, dtype = read_header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not math.prod(shape):
        raise ValueError(
            f"arr_0 must be (N, height, width, 3) uint8 with N at least 1, got {shape} {dtype}"
        )
    return shape, fortran


def digest_of_arrays(paths: Sequence[Path]) -> str:
    """SHA-256 over the uncompressed arrays of .npz files, in the order of `paths`.

    CheckpointError for a damaged file: zipfile verifies the checksum of each array.
    """
    hashed = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, disable=None, unit="B", unit_scale=True, desc="checking", leave=False
    ) as bar:
        for path in paths:
            try:
                with zipfile.ZipFile(path) as archive:
                    for member in sorted(archive.infolist(), key=lambda member: member.filename):
                        hashed.update(f"{member.filename} {member.file_size}\n".encode())
                        with archive.open(member) as file:
                            while piece := file.read(1 << 22):
                                hashed.update(piece)
                        bar.update(member.compress_size)
            except MemoryError:
                raise
            except Exception as error:  # zipfile and its decompressors raise many types
                raise CheckpointError(f"{path} is no whole .npz of images: {error}") from error
    return hashed.hexdigest()
