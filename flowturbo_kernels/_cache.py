"""Files that save a later process some work, in FLOWTURBO_CACHE, else ~/.cache/flowturbo."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """It need not exist, nor be writable.

    Without a home, as in containers of users that the system does not know, it is in the folder
    for temporary files.
    """
    named = os.environ.get("FLOWTURBO_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "flowturbo"
    except RuntimeError:
        return _temporary()


def give_compilers_a_cache() -> None:
    """Let Triton and CuPy cache where they can, if the home can't be written to.

    Triton would fail at its first kernel, and CuPy compile in every process.
    """
    user = Path(os.path.expanduser("~"))
    triton = Path(os.environ.get("TRITON_HOME") or user)
    for variable, home, own in (
        ("TRITON_CACHE_DIR", triton, ".triton"),
        ("CUPY_CACHE_DIR", user, ".cupy"),
    ):
        folder = home / own if (home / own).exists() else home
        if not os.environ.get(variable) and not os.access(folder, os.W_OK | os.X_OK):
            os.environ[variable] = str(_temporary() / own.strip("."))


def _temporary() -> Path:
    """This user's folder among the temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"flowturbo-{user}"


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
