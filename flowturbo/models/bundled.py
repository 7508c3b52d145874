"""The models that ship with the package."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXTRACTED = contextlib.ExitStack()
atexit.register(_EXTRACTED.close)


@functools.cache
def _file(name: str) -> Path:
    """A file that ships with the package; from a zip it is extracted for the process's life."""
    plain = Path(__file__).parent.parent / "bundled" / name
    if plain.exists():
        return plain
    resource = importlib.resources.files(__package__.partition(".")[0]) / "bundled" / name
    return _EXTRACTED.enter_context(importlib.resources.as_file(resource))


@dataclass(frozen=True)
class Bundled:
    """A model that ships with the package."""

    name: str
    refined: bool

    @property
    def predictor(self) -> Path:
        return _file(f"{self.name}.safetensors")

    @property
    def refiner(self) -> Path | None:
        """None if it comes without one."""
        return _file(f"{self.name}-refiner.safetensors") if self.refined else None


MODELS: dict[str, Bundled] = {
    model.name: model
    for model in (Bundled("emoji", refined=False), Bundled("digits", refined=True))
}


def files_of(model: str | os.PathLike[str], refiner: Any) -> tuple[Any, Any]:
    """A model and its refiner, with files in place of a bundled name.

    A bundled model brings its own refiner, if it has one and no other is given.
    """
    if bundled := MODELS.get(str(model)):
        return bundled.predictor, bundled.refiner if refiner is None else refiner
    return model, refiner
