"""The training loop: AdamW, EMA, atomic checkpoints, resuming, and data parallelism by torchrun."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from ..checks import natural
from ..data.latents import Data, order
from ..models.flow_model import Network
from ..models.text_to_image import Labels, PromptNetwork
from ..runtime.rng import StepRandom
from ..storage.files import load_tensors, save_tensors, write_text
from ..storage.resume import check_same

Objective = Callable[[Network, Tensor, Any, StepRandom], Tensor]

# Settings that a resumed run may change: they do not affect the weights at a given step.
_FREE = {"steps", "save_every", "log_every", "tensorboard"}


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
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL, or "pixels".
    It encodes a folder of images, and its name is written into the model's file.
    """
    image_size: int = 256
    """Height and width that the images of a folder are cropped and resized to."""
    steps: int = 100_000
    """Total number of updates."""
    batch_size: int = 256
    """Rows per update, summed over all processes."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine that reaches 0 at the last step."""
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
    """"bf16" is autocast and needs CUDA; "auto" is bf16 on CUDA and fp32 on the CPU."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the folder."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        natural("seed", self.seed)
        for name, choices in (
            ("schedule", ("constant", "cosine")),
            ("precision", ("auto", "fp32", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name, low, high in (
            ("lr", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup", 0, math.inf),
            ("clip", 0, math.inf),
            ("ema", 0, 1),
            ("label_drop", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, a function of its number alone: resuming needs no state."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


class Weights(NamedTuple):
    """How a run writes its result. name: of the file in the run's folder.

    save: (settings, EMA network, number of steps) writes it.
    """

    name: str
    save: Callable[[Settings, nn.Module, int], object]


def provenance(settings: Settings, step: int) -> dict[str, Any]:
    """What a file of weights says of its training."""
    return {"settings": _plain(settings), "steps": step, "torch": torch.__version__}


def run_training(
    network: nn.Module,
    objective: Objective,
    data: Data,
    settings: Settings,
    device: torch.device,
    weights: Weights,
) -> Path:
    """Train `network` in place, or resume its run; returns the path of the EMA weights.

    Under torchrun each process takes its share of the rows of every update; the result is that of
    one process with the whole batch, up to rounding. ValueError for settings that do not fit the
    machine or an earlier run, FloatingPointError if the loss is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _check_machine(settings, world, device)
    network.to(device).train().requires_grad_(True)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    run = _Run(settings, network, ema, optimizer, weights)
    first = run.resume()
    share = settings.batch_size // world
    rows = range(rank * share, (rank + 1) * share)
    parallel = _parallel(network) if world > 1 else network
    autocast = device.type == "cuda" and settings.precision != "fp32"
    log = _Log(settings, first) if rank == 0 else None
    with tqdm(
        total=settings.steps, initial=first, disable=None if rank == 0 else True, unit="step"
    ) as bar:
        for step in range(first, settings.steps):
            draws = StepRandom(settings.seed, step, rows)
            indices = order(
                len(data), settings.seed, step * settings.batch_size + rows.start, share
            )
            latents, labels = data.batch(indices, draws)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = objective(
                    cast(Network, parallel), latents.to(device), _moved(labels, device), draws
                )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update_parameters(network)
            average = _mean_over_workers(loss.detach())
            count = step + 1
            if log is not None:
                log.add(count, average, norm, settings.rate(step), bar)
                if count % settings.save_every == 0 or count == settings.steps:
                    _check_finite(average, count)
                    run.save(count)
    if log is not None:
        log.close()
    return run.weights


def _check_machine(settings: Settings, world: int, device: torch.device) -> None:
    if settings.batch_size % world:
        raise ValueError(
            f"batch_size must be a multiple of the {world} processes, got {settings.batch_size}"
        )
    if settings.precision == "bf16" and device.type != "cuda":
        raise ValueError(f"precision 'bf16' is autocast on CUDA, but the device is {device}")


def _parallel(network: nn.Module) -> nn.Module:
    # FLUX's last two-stream block leaves one stream's output unused.
    unused = isinstance(network, PromptNetwork)
    parallel = nn.parallel.DistributedDataParallel
    # Buffers are constants and need no exchange. Torch 2.13 renamed this option.
    renamed = "forward_sync_buffers"
    options: dict[str, Any] = {
        renamed if renamed in inspect.signature(parallel).parameters else "broadcast_buffers": False
    }
    return parallel(network, find_unused_parameters=unused, **options)


def _moved(labels: Labels, device: torch.device) -> Labels:
    return (
        labels.to(device)
        if isinstance(labels, Tensor)
        else {name: value.to(device) for name, value in labels.items()}
    )


def _check_finite(loss: Tensor, step: int) -> None:
    if not math.isfinite(float(loss)):
        raise FloatingPointError(
            f"the loss is {float(loss)} at step {step}: try a lower lr, or clip"
        )


class _Run:
    """The state that resuming needs: weights, EMA, optimiser and the number of finished steps.

    Random numbers need no state, since each is addressed by (seed, step, row).
    """

    def __init__(
        self,
        settings: Settings,
        network: nn.Module,
        ema: AveragedModel,
        optimizer: torch.optim.Optimizer,
        weights: Weights,
    ) -> None:
        self.settings, self.network, self.ema, self.optimizer = settings, network, ema, optimizer
        self.path, self.weights, self._save_weights = (
            settings.out / "state.safetensors",
            settings.out / weights.name,
            weights.save,
        )

    def save(self, step: int) -> None:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in entries.items()}
        # The state last: a run killed between the two writes repeats these steps, and both files.
        self._save_weights(self.settings, self.ema.module, step)
        save_tensors(
            self.path,
            tensors,
            {"kind": "training state", "step": step, "settings": _plain(self.settings)},
        )

    def resume(self) -> int:
        """Load the saved state if there is one; returns the number of finished steps."""
        if not self.path.exists():
            return 0
        tensors, description = load_tensors(self.path)
        if description is None or description.get("kind") != "training state":
            raise ValueError(
                f"{self.path} is no training state of this library: choose another folder as out"
            )
        self._check_settings(description["settings"])
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.network.load_state_dict(parts["network"])
        self.ema.load_state_dict(parts["ema"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, entry = name.partition(".")
            moments.setdefault(int(index), {})[entry] = value
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": moments})
        return int(description["step"])

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        now = _plain(self.settings)
        free = _FREE if now["schedule"] == "constant" else _FREE - {"steps"}
        check_same(self.path, before, now, free=free)


class _Log:
    """log.jsonl: one line every `log_every` steps, and TensorBoard events if they are asked for.

    A line holds step, loss (the mean since the last line), grad_norm, lr and seconds_per_step.
    """

    def __init__(self, settings: Settings, first: int) -> None:
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
        _check_finite(mean, step)
        values = {
            "step": step,
            "loss": float(mean),
            "grad_norm": float(norm),
            "lr": rate,
            "seconds_per_step": (time.perf_counter() - self.since) / len(self.losses),
        }
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        bar.set_postfix(loss=f"{values['loss']:.4f}")
        if self.board is not None:
            for name in ("loss", "grad_norm", "lr"):
                self.board.add_scalar(name, values[name], step)
        self.losses, self.since = [], time.perf_counter()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _mean_over_workers(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings as files keep them, JSON types only.

    Of paths only the last part is kept: files are shared, and folders may be private or move.
    """
    plain = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "device")}
    for name in ("data", "teacher", "vae"):
        if isinstance(plain.get(name), str) and Path(plain[name]).exists():
            plain[name] = Path(plain[name]).name
    return json.loads(json.dumps(plain))
