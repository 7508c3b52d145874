"""A small model's file with names of classes, plans and a recommended guidance scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import CONFIG, random_sit

import flowturbo as ft
from flowturbo.models.checkpoint import save_sit

NAMES = ("smiley", "smiley-3d", "heart", "cat", "animal-face", "hot dog")
GUIDANCE = 2.25
CONFIG_OF_NAMED = replace(CONFIG, channels=1, num_classes=len(NAMES))
PLANS = {
    "default": ft.Plan("AAA", (0.0, 0.3, 0.7, 1.0), (0.1, 0.9)),
    "fast": ft.Plan.parse("E2"),
    "best, so far": ft.Plan("ELL", (0.0, 0.25, 0.5, 1.0), weights=((0.3, -0.05), (0.8, -0.3))),
}
"""None of which is what its letters alone make, but "fast"."""


def contents(folder: Path, plans: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the files of plans hold, by name."""
    held = {}
    for name, plan in (PLANS if plans is None else plans).items():
        file = folder / "plan.json"
        plan.save(file, {"found by": "a test"})
        held[name] = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
    return held


def write(path: Path, **changes: Any) -> Path:
    """The file, which decodes its latents as pixels."""
    notes = {"class_names": NAMES, "plans": contents(path.parent), "guidance": GUIDANCE}
    save_sit(path, random_sit(CONFIG_OF_NAMED, 0), vae="pixels", **{**notes, **changes})
    return path


def pictures(path: Path) -> np.ndarray:
    """The images in an .npz, (N, height, width, 3)."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"]
