"""Files that spare a later process some work: FLOWTURBO_CACHE, else ~/.cache/flowturbo."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where they lie; it need not be there, nor be writable."""
    return Path(os.environ.get("FLOWTURBO_CACHE") or Path.home() / ".cache" / "flowturbo")


def whole_file(path: Path, content: bytes) -> None:
    """Written whole or not at all; a folder that can't be written costs the next process its work
    again, no more.
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
