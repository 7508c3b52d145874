"""Small training runs, and what is left of them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from torch import Tensor

from flowturbo.storage.files import load_tensors
from flowturbo.training.train import Distill, Train

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
CLASSES = 3


TINY: dict[str, Any] = dict(
    model="custom",
    hidden=16,
    depth=1,
    heads=2,
    batch_size=8,
    steps=12,
    lr=1e-3,
    ema=0.9,
    save_every=5,
    log_every=1,
    device="cpu",
)


def tiny(out: Path, data: str, **changes: Any) -> Train:
    return Train(out=out, data=data, **{**TINY, **changes})


def log_of(out: Path) -> list[dict[str, float]]:
    return [
        json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def contents(out: Path) -> dict[str, Tensor]:
    """All tensors that a run left: the model's and the state's."""
    everything = {}
    for name in ("model", "state"):
        tensors, described = load_tensors(out / f"{name}.safetensors")
        assert described is not None
        steps = described["step"] if name == "state" else described["provenance"]["steps"]
        everything |= {f"{name} {k}": v for k, v in tensors.items()} | {
            f"{name}, steps": torch.tensor(steps)
        }
    return everything


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def learnt(out: Path) -> list[tuple[float, ...]]:
    """The log without its clock."""
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in log_of(out)]


def tiny_refiner(out: Path, data: str, teacher: Path, **changes: Any) -> Distill:
    kept = {k: v for k, v in TINY.items() if k not in ("model", "hidden", "patch")}
    return Distill(out=out, data=data, teacher=str(teacher), **{**kept, "lr": 3e-3, **changes})
