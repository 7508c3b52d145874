"""What an evaluation keeps: results as JSON, and tensors that grow by batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import listed
from ..models.not_finite import not_finite_rows
from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from ..storage.files import save_tensors
from ..storage.resume import resumed_tensors


def results_json(results: Mapping[str, Any]) -> str:
    """JSON with one line per row, so that a diff shows which plans changed."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def check_images(name: str, plan: Plan | StagedPlan, latents: Tensor) -> None:
    """ValueError, naming the setting and the plan, for latents with NaN or infinity."""
    if broken := not_finite_rows(latents):
        raise ValueError(
            f"{name}: {plan} gives NaN or infinity, so it can't be measured: of "
            f"{len(latents)} images these: {listed(broken)}"
        )


class Growing:
    """Tensors in a file to which batches are added.

    A run that is killed and started again goes on after the last batch that was added.
    identity: what the tensors depend on; ValueError for a file with another one.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.tensors: dict[str, Tensor] = resumed_tensors(path, identity) or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def count(self, name: str) -> int:
        """The rows that a tensor has so far."""
        return len(self.tensors[name]) if name in self.tensors else 0

    def add(self, **rows: Tensor) -> None:
        """Append rows to each tensor, and write the file."""
        for name, new in rows.items():
            old = self.tensors.get(name)
            self.tensors[name] = new if old is None else torch.cat([old, new])
        save_tensors(self.path, self.tensors, self.identity)
