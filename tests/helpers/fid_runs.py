"""Small images, and their evaluation by a small random network."""

import json
from pathlib import Path

import numpy as np

from flowturbo.evaluation.fid_settings import Fidelity

ALL = ("fid", "sfid", "is", "precision", "recall")


def images(seed: int, count: int, mean: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    smooth = generator.normal(mean, 60, (count, 4, 4, 3)).repeat(3, axis=1).repeat(3, axis=2)
    return np.clip(smooth, 0, 255).astype(np.uint8)


SAMPLES, REFERENCE = images(0, 45, 120), images(1, 60, 140)


def settings(files: Path, out: Path, **changes) -> Fidelity:
    defaults = dict(
        metrics=ALL,
        reference=files / "reference.npz",
        samples=files / "samples.npz",
        batch_size=4,
        device="cpu",
        out=out,
    )
    return Fidelity(**{**defaults, **changes})


def read(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def inside(points: np.ndarray, manifold: np.ndarray) -> float:
    """The share of points within the third nearest other neighbour of some point of the
    manifold.
    """
    reach = np.sort(np.linalg.norm(manifold[:, None] - manifold[None], axis=2), axis=1)[:, 3]
    return float(
        (np.linalg.norm(points[:, None] - manifold[None], axis=2) <= reach).any(axis=1).mean()
    )


def of_digits(files: Path, out: Path, **changes) -> Fidelity:
    return settings(
        files,
        out,
        **{
            "samples": None,
            "model": "digits",
            "images": 24,
            "plans": ("H1R1",),
            "metrics": "fid,is",
            **changes,
        },
    )
