"""Files that spare a later process some work: FLOWTURBO_CACHE, else ~/.cache/flowturbo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where two processes that write at once may lose what one of them measured
    fcntl = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """Where they lie; it need not be there, nor be writable."""
    return Path(os.environ.get("FLOWTURBO_CACHE") or Path.home() / ".cache" / "flowturbo")


def whole_file(path: Path, content: bytes) -> None:
    """Written whole or not at all; a folder that can't be written costs the next process its work again, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        pass


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process is inside for that file; without a lock where the folder, or its file system, has none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(path.name + ".lock"), "wb")  # noqa: SIM115 (closed below; what is yielded may raise OSError too)
    except OSError:
        yield
        return
    with lock:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
