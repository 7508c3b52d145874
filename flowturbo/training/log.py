"""The log of a training run."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from ..storage.files import write_text
from .settings import Settings


class Log:
    """log.jsonl: one line every `log_every` steps, and TensorBoard events if they are asked for.

    A line holds step, loss (the mean since the last line), grad_norm, lr and seconds_per_step.
    """

    def __init__(self, settings: Settings, first: int) -> None:
        self.batch_size = settings.batch_size
        self.every, self.path = settings.log_every, settings.out / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # A killed run may have logged steps that are now repeated, and cut its last line short.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.losses: list[Tensor] = []
        self.since = time.perf_counter()
        self.board: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(settings.out), purge_step=first)

    def add(self, step: int, loss: Tensor, norm: Tensor, rate: float, bar: Any) -> None:
        self.losses.append(loss)
        bar.update()
        if step % self.every:
            return
        mean = torch.stack(self.losses).mean()
        check_finite(mean, step)
        values = {
            "step": step,
            "loss": float(mean),
            "grad_norm": float(norm),
            "lr": rate,
            "seconds_per_step": (time.perf_counter() - self.since) / len(self.losses),
        }
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        speed = self.batch_size / values["seconds_per_step"]
        bar.set_postfix_str(f"loss={values['loss']:.4f}, {speed:.0f} images/s")
        if self.board is not None:
            for name in ("loss", "grad_norm", "lr"):
                self.board.add_scalar(name, values[name], step)
        self.losses, self.since = [], time.perf_counter()

    def note(self, step: int, **values: float) -> None:
        """A line of its own with other values, and their TensorBoard events."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def check_finite(loss: Tensor, step: int) -> None:
    """FloatingPointError for a loss that is NaN or infinity."""
    if not math.isfinite(float(loss)):
        raise FloatingPointError(
            f"the loss is {float(loss)} at step {step}: try a lower lr, or clip"
        )
