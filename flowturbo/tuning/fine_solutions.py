"""Fine solutions that outlive a killed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..storage.files import save_tensors
from ..storage.resume import resumed_tensors


class FineSolutions:
    """Fine solutions in files of a folder, one a batch: a run that resumes has them already.

    identity: what they depend on; see `resumed_tensors`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def __call__(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The latents of that name, on the CPU where they come from a file."""
        path = self.folder / f"{name}.safetensors"
        held = resumed_tensors(path, self.identity)
        if held is not None:
            return held["fine"]
        fine = make()
        save_tensors(path, {"fine": fine}, self.identity)
        return fine


Fine = Callable[[str, Callable[[], Tensor]], Tensor]
"""FineSolutions, or a function that computes them each time."""
