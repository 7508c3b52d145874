"""What models' files say of themselves, read from their headers, without the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import finite
from ..storage.files import MARK, CheckpointError, header_texts
from .bundled import files_of
from .model_plans import Plans, checked_plans

GUIDANCE = 1.5
"""The guidance scale of commands where neither the user nor the model's file names one."""


def named_plans(
    model: str | os.PathLike[str], refiner: str | os.PathLike[str] | None = None
) -> Plans:
    """The plans that the files of a model and its refiner hold, by name; none if unreadable.

    So a plan can be checked before the model is loaded, which says what is wrong with the file.
    """
    plans: dict[str, Any] = {}
    for description in _descriptions(model, refiner):
        try:
            plans |= checked_plans(description.get("plans", {}))
        except (ValueError, TypeError, RecursionError):
            continue
    return plans


def recommended_guidance(
    model: str | os.PathLike[str], refiner: str | os.PathLike[str] | None = None
) -> float:
    """The guidance scale that the refiner's or the model's file recommends, else 1.5."""
    scale = GUIDANCE
    for description in _descriptions(model, refiner):
        try:
            scale = finite("guidance", description["guidance"])
        except (ValueError, TypeError, KeyError):
            continue
    return scale


def _descriptions(
    model: str | os.PathLike[str], refiner: str | os.PathLike[str] | None
) -> list[Mapping[str, Any]]:
    """The later one comes first where both say something."""
    return [_description(path) for path in files_of(model, refiner) if path is not None]


def _description(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """That of a file of this project, else nothing."""
    if Path(path).suffix.lower() != ".safetensors":
        return {}
    try:
        description = json.loads(header_texts(path).get(MARK, "{}"))
    except (CheckpointError, ValueError, RecursionError, OSError):
        return {}
    return description if isinstance(description, dict) else {}


class Guided:
    """A command's settings with a guidance scale that the model's file may recommend."""

    model: Any
    guidance: float | None

    def choose_guidance(self) -> None:
        """Put the recommended scale in place of None; ValueError for one that is not finite."""
        if self.guidance is None:
            refiner = getattr(self, "refiner", None)
            chosen = GUIDANCE if self.model is None else recommended_guidance(self.model, refiner)
            object.__setattr__(self, "guidance", chosen)
        finite("guidance", self.scale)

    @property
    def scale(self) -> float:
        """The guidance scale, chosen."""
        assert self.guidance is not None
        return self.guidance
