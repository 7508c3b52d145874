"""The training loop: updates, EMA, checkpoints, resuming, and data parallelism by torchrun."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from ..data.latents import Data
from ..models.flow_model import Network
from ..models.text_to_image import PromptNetwork
from ..runtime.rng import StepRandom
from ..storage.files import load_tensors, save_tensors
from ..storage.resume import check_same
from .held_out import HeldOut, moved
from .log import Log, check_finite
from .objectives import Objective
from .optimizers import Optimizers
from .rows import Rows, resized
from .settings import Settings, free_to_change, plain, provenance, with_new_settings


class Weights(NamedTuple):
    """How a run writes its result. name: of the file in the run's folder.

    save: (settings, EMA network, provenance) writes it.
    """

    name: str
    save: Callable[[Settings, nn.Module, Mapping[str, Any]], object]


def run_training(
    network: nn.Module,
    objective: Objective,
    data: Data,
    settings: Settings,
    device: torch.device,
    weights: Weights,
    held_out: tuple[Data, Objective] | None = None,
) -> Path:
    """Train `network` in place, or resume its run; returns the path of the EMA weights.

    Under torchrun each process takes its share of the rows of every update; the result is that of
    one process with the whole batch, up to rounding. ValueError for settings that do not fit the
    machine or an earlier run, FloatingPointError if the loss is not finite.
    held_out: data that is not trained on, and the objective whose loss on it is logged.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.batch_size % world:
        raise ValueError(
            f"batch_size must be a multiple of the {world} processes, got {settings.batch_size}"
        )
    network.to(device).train().requires_grad_(True)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizers = Optimizers(network, settings)
    run = _Run(settings, network, ema, optimizers, weights)
    first = run.resume()
    share = settings.batch_size // world
    rows = range(rank * share, (rank + 1) * share)
    parallel = cast(Network, _compiled(_parallel(network) if world > 1 else network, settings))
    order, autocast = Rows(data, settings), Autocast(settings, device)
    log = Log(settings, first) if rank == 0 else None
    judged = HeldOut(*held_out, autocast) if held_out is not None and log else None
    with tqdm(
        total=settings.steps, initial=first, disable=None if rank == 0 else True, unit="step"
    ) as bar:
        for step in range(first, settings.steps):
            draws = StepRandom(settings.seed, step, rows)
            latents, labels = data.batch(order.at(step, rows), draws)
            latents = resized(latents, settings.sides, settings.sides_share, draws).to(device)
            with autocast():
                loss = objective(parallel, latents, moved(labels, device), draws)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip or math.inf)
            optimizers.step(step)
            ema.update_parameters(network)
            average = _mean_over_workers(loss.detach())
            count = step + 1
            if log is not None:
                log.add(count, average, norm, settings.rate(step), bar)
                if count % settings.save_every == 0 or count == settings.steps:
                    check_finite(average, count)
                    run.save(count)
                    if judged is not None:
                        log.note(count, held_out_loss=judged.loss(ema.module))
    if log is not None:
        log.close()
    return run.weights


class Autocast:
    """Autocast to bfloat16 where the settings ask for it, which "auto" does on CUDA alone."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        by_default = device.type == "cuda" and settings.precision == "auto"
        self.device, self.enabled = device, by_default or settings.precision == "bf16"

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled)


def _compiled(network: nn.Module, settings: Settings) -> nn.Module:
    # The sizes of a run are few and known, so each gets code of its own.
    return cast(nn.Module, torch.compile(network, dynamic=False)) if settings.compile else network


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


class _Run:
    """The state that resuming needs: weights, EMA, optimiser and the number of finished steps.

    Random numbers need no state, since each is addressed by (seed, step, row).
    """

    def __init__(
        self,
        settings: Settings,
        network: nn.Module,
        ema: AveragedModel,
        optimizers: Optimizers,
        weights: Weights,
    ) -> None:
        self.settings, self.network, self.ema, self.optimizers = settings, network, ema, optimizers
        self.described = plain(settings)
        self.path, self.weights, self._save_weights = (
            settings.out / "state.safetensors",
            settings.out / weights.name,
            weights.save,
        )

    def save(self, step: int) -> None:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= self.optimizers.state()
        # The state last: a run killed between the two writes repeats these steps, and both files.
        self._save_weights(self.settings, self.ema.module, provenance(self.described, step))
        save_tensors(
            self.path,
            tensors,
            {"kind": "training state", "step": step, "settings": self.described},
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
        before = with_new_settings(type(self.settings), description["settings"])
        step = int(description["step"])
        free = free_to_change(before, self.described, step)
        check_same(self.path, before, self.described, free=free)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        self.network.load_state_dict(parts["network"])
        self.ema.load_state_dict(parts["ema"])
        self.optimizers.load(parts)
        return step


def _mean_over_workers(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
