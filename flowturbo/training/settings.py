"""The settings of every training run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import natural, positive
from ..models.bundled import files_of
from ..models.digests import model_digest
from ..models.headers import named_plans
from ..models.model_plans import Plans
from ..storage.provenance import file_digest

# Settings that a resumed run may change: they do not affect the weights at a given step.
_FREE = {"steps", "save_every", "log_every", "tensorboard", "held_out"}
_CHOICES = {
    "schedule": ("constant", "cosine", "wsd"),
    "precision": ("auto", "fp32", "bf16"),
    "optimizer": ("adamw", "muon"),
    "class_weights": ("none", "root", "equal"),
}
_RANGES = {
    "lr": (0, math.inf),
    "muon_lr": (0, math.inf),
    "beta2": (0, 1),
    "weight_decay": (0, math.inf),
    "warmup": (0, math.inf),
    "decay_steps": (0, math.inf),
    "clip": (0, math.inf),
    "ema": (0, 1),
    "label_drop": (0, 1),
    "sides_share": (0, 1),
}


@dataclass(frozen=True)
class Settings:
    """Settings of every training run."""

    out: Path
    """Folder for model.safetensors (EMA weights), state.safetensors (to resume) and log.jsonl.
    If it already holds a run with the same settings, the run resumes."""
    data: str = "digits"
    """"digits", an .npz of latents, or a folder of shards from `flowturbo encode`.
    Or a folder of images with one sub-folder per class.
    """
    held_out: str | None = None
    """Latents like those of --data that are not trained on.
    The loss of the EMA weights on them, always with the same noise, is logged with each checkpoint.
    """
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL, "pixels" (grey) or "rgb".
    It encodes a folder of images, and its name is written into the model's file.
    """
    image_size: int = 256
    """Height and width that the images of a folder are cropped and resized to."""
    sides: tuple[int, ...] = ()
    """Further sides of the latents to train on, each a divisor of the data's.
    The latents are averaged over squares, which suits pixels. All rows of a step have one size.
    """
    sides_share: float = 0.25
    """Share of the steps that are of one of --sides."""
    class_weights: Literal["none", "root", "equal"] = "none"
    """How often classes are drawn, where some are rare: "none" visits every row once an epoch.
    "root" draws a class in proportion to the square root of its rows, "equal" all alike.
    """
    steps: int = 100_000
    """Total number of updates."""
    batch_size: int = 256
    """Rows per update, summed over all processes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon": Muon (torch 2.9 or later) for the matrices of the blocks, which needs fewer steps.
    All other weights are AdamW's.
    """
    lr: float = 1e-4
    """Learning rate of AdamW."""
    muon_lr: float = 0.02
    """Learning rate of Muon, scaled to the size of AdamW's updates."""
    beta2: float = 0.999
    """AdamW's decay of the mean square of gradients; 0.99 adapts sooner in short runs."""
    weight_decay: float = 0.0
    """Weight decay of the optimiser."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine that reaches 0 at the last step.
    "wsd" (warm-up, stable, decay) is constant, then falls linearly to 0 over --decay-steps at the
    end; until then the run may be made longer.
    """
    decay_steps: int = 0
    """Steps at the end over which --schedule wsd falls to 0."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 means no limit."""
    ema: float = 0.9999
    """Decay of the exponential moving average of the weights."""
    label_drop: float = 0.1
    """Probability with which a label is replaced by the null class."""
    seed: int = 0
    """Seed of all random numbers. Row j of step k draws from (seed, k, j) alone."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines of the log."""
    device: str | None = None
    """"cuda" or "cpu". Default: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"bf16" is autocast; "auto" is bf16 on CUDA and fp32 on the CPU.
    On a CPU bf16 is faster where it has instructions for it, which `flowturbo info` says.
    """
    compile: bool = False
    """Compile the network by torch.compile: minutes at the start, then fewer passes over memory."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the folder."""

    def __post_init__(self) -> None:
        if not isinstance(self.sides, list | tuple):
            raise TypeError(f"sides must be a tuple of whole numbers, got {self.sides!r}")
        object.__setattr__(self, "sides", tuple(positive("sides", s) for s in self.sides))
        for name in ("steps", "batch_size", "save_every", "log_every", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        natural("seed", self.seed)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        refuse_unused(self, "optimizer", "muon", "muon_lr")
        if not self.sides and changed(self, "sides_share"):
            raise ValueError(
                "sides_share is for sides, and there are none: leave it out, got "
                f"{self.sides_share}"
            )
        if self.sides and not self.sides_share:
            raise ValueError("sides_share must be above 0 to train on sides, got 0")
        if self.beta2 == 1:
            raise ValueError("beta2 must be below 1, got 1")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"decay_steps must be above 0 with schedule 'wsd' and 0 without, got "
                f"{self.decay_steps} with {self.schedule!r}"
            )
        if self.decay_steps > self.steps:
            raise ValueError(
                f"decay_steps must be at most steps {self.steps}, got {self.decay_steps}"
            )

    def schedule_factor(self, step: int) -> float:
        """What the learning rates are multiplied by in a step, a function of its number alone:
        resuming needs no state.
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return warm
        if self.schedule == "wsd":
            return warm * min(1.0, (self.steps - step) / (self.decay_steps + 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

    def rate(self, step: int) -> float:
        """AdamW's learning rate of a step."""
        return self.lr * self.schedule_factor(step)


def changed(settings: Settings, *names: str) -> list[str]:
    """Those of these settings that are not at their default."""
    return [name for name in names if getattr(settings, name) != getattr(type(settings), name)]


def refuse_unused(settings: Settings, choice: str, needed: str, *names: str) -> None:
    """ValueError for options that have an effect only with another choice than the one made."""
    if getattr(settings, choice) == needed:
        return
    for name in changed(settings, *names):
        raise ValueError(
            f"{name} is for {choice} {needed!r}, not {getattr(settings, choice)!r}: leave it "
            f"out, got {getattr(settings, name)}"
        )


def free_to_change(before: Mapping[str, Any], now: Mapping[str, Any], finished: int) -> set[str]:
    """The settings that may differ from those of an earlier run of so many finished steps."""
    if now["schedule"] == "constant":
        return _FREE
    if now["schedule"] == "wsd" == before["schedule"]:
        # The rate does not depend on the end until it begins to fall.
        if all(finished <= run["steps"] - run["decay_steps"] for run in (before, now)):
            return _FREE | {"decay_steps"}
        if before["steps"] == now["steps"]:
            return _FREE
    return _FREE - {"steps"}


def with_new_settings(kind: type, before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, and the defaults of those that it does not know yet.

    kind: the class of the settings. Defaults of new settings leave results as they were.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    known = {k: v for k, v in defaults.items() if v is not dataclasses.MISSING}
    return {**json.loads(json.dumps(known, default=str)), **before}


def provenance(described: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What a file of weights says of its training. described: the settings, by `plain`."""
    return {"settings": dict(described), "steps": step, "torch": torch.__version__}


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as files keep them, JSON types only.

    Of paths only the last part is kept: files are shared, and folders may be private or move. The
    teacher, and plans from files, have the first digits of a SHA-256, so that another one of the
    same name is another setting. A run asks once: it reads these files, which may move later.
    """
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "device")}
    for name in ("data", "held_out", "vae"):
        if isinstance(values.get(name), str):
            values[name] = _last_part(values[name])
    if teacher := values.get("teacher"):
        path, named = files_of(teacher, None)[0], named_plans(teacher)
        values["plans"] = [_plan(text, named) for text in values["plans"]]
        values["teacher"] = _last_part(teacher)
        if Path(path).is_file():
            values["teacher"] += f" ({str(model_digest(path))[:8]})"
    return json.loads(json.dumps(values))


def _plan(text: str, named: Plans) -> str:
    """named: the plans of the teacher's file."""
    if text in named:
        record = json.dumps(named[text].record(), sort_keys=True)
        return f"{text} ({hashlib.sha256(record.encode()).hexdigest()[:8]})"
    path = Path(text)
    return f"{path.name} ({str(file_digest(path))[:8]})" if path.is_file() else text


def _last_part(text: str) -> str:
    """Of a path that exists its last part, and other texts as they are."""
    return Path(text).name if Path(text).exists() else text
