"""Small searches for plans, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import CONFIG, random_sit

from flowturbo.models.checkpoint import save_sit
from flowturbo.tuning.settings import Tune


def write_weights(folder: Path) -> Path:
    """Files of a tiny model and its refiner; returns the folder."""
    for name, config, seed in (("predictor", CONFIG, 0), ("refiner", CONFIG.refiner(), 1)):
        save_sit(folder / f"{name}.safetensors", random_sit(config, seed))
    return folder


def small_search(weights: Path, out: Path, **options: Any) -> Tune:
    """A search on the model in a folder of `write_weights`."""
    return Tune(
        out=out,
        model=str(weights / "predictor.safetensors"),
        refiner=str(weights / "refiner.safetensors"),
        heads=CONFIG.heads,
        device="cpu",
        **options,
    )


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "tuning.json").read_text(encoding="utf-8"))
