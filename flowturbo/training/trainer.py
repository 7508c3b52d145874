"""The training engine: AdamW, EMA, checkpoints that survive a kill, and data parallelism under
torchrun.
"""

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

# May differ between a run and its resumption: they do not touch what is learnt up to a given step.
_FREE = {"steps", "save_every", "log_every", "tensorboard"}


@dataclass(frozen=True)
class Settings:
    """Settings of every training run."""

    out: Path
    """Folder for model.safetensors (EMA weights), state.safetensors (to resume) and log.jsonl; a
    run that it holds goes on.
    """
    data: str = "digits"
    """"digits", an .npz or a folder of shards as `flowturbo encode` writes, or a folder of images
    with a folder a class.
    """
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL, or "pixels": encodes a folder of images;
    named in the model's file.
    """
    image_size: int = 256
    """To which images of a folder are cropped and resized."""
    steps: int = 100_000
    """Updates in all."""
    batch_size: int = 256
    """Rows of an update, over all processes."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine that falls to zero at the last step."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 is no limit."""
    ema: float = 0.9999
    """Decay of the average of the weights."""
    label_drop: float = 0.1
    """Probability with which a label becomes the null class."""
    seed: int = 0
    """Row j of step k draws from (seed, k, j) alone."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines of the log."""
    device: str | None = None
    """"cuda" or "cpu"; left out: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"bf16" is autocast, on CUDA only; "auto" is bf16 there, else fp32."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the folder too."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        natural("seed", self.seed)
        for name, known in (
            ("schedule", ("constant", "cosine")),
            ("precision", ("auto", "fp32", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
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
        """The learning rate of a step, a function of its number alone."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


class Weights(NamedTuple):
    """How the weights are kept that a training is for. name: the file's, in the folder of the
    run.
    """

    name: str
    save: Callable[[Settings, nn.Module, int], object]


def provenance(settings: Settings, step: int) -> dict[str, Any]:
    return {"settings": _plain(settings), "steps": step, "torch": torch.__version__}


def run_training(
    network: nn.Module,
    objective: Objective,
    data: Data,
    settings: Settings,
    device: torch.device,
    weights: Weights,
) -> Path:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.batch_size % world:
        raise ValueError(
            f"batch_size must be a multiple of the {world} processes, got {settings.batch_size}"
        )
    if settings.precision == "bf16" and device.type != "cuda":
        raise ValueError(f"precision 'bf16' is autocast on CUDA, but the device is {device}")
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
            done = step + 1
            if log is not None:
                log.add(done, average, norm, settings.rate(step), bar)
                if done % settings.save_every == 0 or done == settings.steps:
                    _check_finite(average, done)
                    run.save(done)
    if log is not None:
        log.close()
    return run.weights


def _parallel(network: nn.Module) -> nn.Module:
    # FLUX's last block of two streams makes one of them for nobody.
    unused = isinstance(network, PromptNetwork)
    parallel = nn.parallel.DistributedDataParallel
    # Buffers are constants, so they need no exchange. Torch 2.13 warns of the name that this had.
    new = "forward_sync_buffers"
    options: dict[str, Any] = {
        new if new in inspect.signature(parallel).parameters else "broadcast_buffers": False
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
    """What a run must keep to go on: weights, EMA, optimiser and the number of steps done. Random
    numbers need no state.
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
        # The state last: a run that is killed between the two makes these steps, and both files,
        # again.
        self._save_weights(self.settings, self.ema.module, step)
        save_tensors(
            self.path,
            tensors,
            {"kind": "training state", "step": step, "settings": _plain(self.settings)},
        )

    def resume(self) -> int:
        """Load the saved state if there is one -> the number of steps done."""
        if not self.path.exists():
            return 0
        tensors, described = load_tensors(self.path)
        if described is None or described.get("kind") != "training state":
            raise ValueError(
                f"{self.path} is no training state of this library: choose another folder as out"
            )
        self._check_settings(described["settings"])
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
        return int(described["step"])

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        now = _plain(self.settings)
        free = _FREE if now["schedule"] == "constant" else _FREE - {"steps"}
        check_same(self.path, before, now, free=free)


class _Log:
    """log.jsonl: a line every `log_every` steps with step, loss (mean since the last line),
    grad_norm, lr and seconds a step.
    """

    def __init__(self, settings: Settings, first: int) -> None:
        self.every, self.path = settings.log_every, settings.out / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # A killed run may have logged steps that are made again, and cut its last line short.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.file = open(self.path, "a")  # noqa: SIM115
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
    """The settings as files keep them: of paths only the names, since files travel and folders are
    nobody else's business.
    """
    plain = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "device")}
    for name in ("data", "teacher", "vae"):
        if isinstance(plain.get(name), str) and Path(plain[name]).exists():
            plain[name] = Path(plain[name]).name
    return json.loads(json.dumps(plain))
