"""Files that save a later process some work, in FLOWTURBO_CACHE, else ~/.cache/flowturbo."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """It need not exist, nor be writable."""
    return Path(os.environ.get("FLOWTURBO_CACHE") or Path.home() / ".cache" / "flowturbo")


def write_atomically(path: Path, content: bytes) -> None:
    """Write all of it or nothing. Where the folder is not writable, nothing: the next process does
    the work again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        pass
