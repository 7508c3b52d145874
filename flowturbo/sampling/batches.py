"""Images in batches: what runs a batch, and the loop over batches."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import positive
from ..models.flow_model import FlowModel
from ..models.not_finite import Name, checked
from ..solver.plan import Plan
from .run import Callback, Job, StepMonitor


class Batches(Protocol):
    """What `in_batches` runs, batch by batch."""

    size: int
    """The default number of images per batch."""

    def run(self, rows: Tensor, monitor: StepMonitor) -> Tensor:
        """The latents or images of these numbers, (len(rows), ...)."""
        ...


class Watch(NamedTuple):
    """Who watches a run.

    progress, callback: as for `sample`.
    before, after: the steps of the stages before and after this one.
    """

    progress: bool = False
    callback: Callback | None = None
    before: int = 0
    after: int = 0


class Done(NamedTuple):
    """The results of the batches that were started, and whether the callback ended the run."""

    parts: list[Tensor]
    stopped: bool


def run_batches(batches: Batches, N: int, plan: Plan, batch_size: int | None, watch: Watch) -> Done:
    """Run N images in batches, or fewer if the callback ends it."""
    size = batches.size if batch_size is None else positive("batch_size", batch_size)
    parts = []
    with tqdm(
        total=math.ceil(N / size) * len(plan),
        disable=not watch.progress,
        unit="step",
        leave=False,
    ) as bar:
        for first in range(0, N, size):
            # The last batch is padded with its last image.
            rows = torch.arange(first, first + size, device="cpu").clamp(max=N - 1)
            count = min(size, N - first)
            monitor = StepMonitor(
                plan, first, count, bar, watch.callback, watch.before, watch.after
            )
            parts.append(batches.run(rows, monitor)[:count])
            if monitor.stopped:
                return Done(parts, True)
    return Done(parts, False)


def in_batches(
    batches: ModelBatches,
    N: int,
    plan: Plan,
    batch_size: int | None,
    progress: bool,
    callback: Callback | None,
) -> Tensor:
    """Run N images in batches -> (N, ...), or fewer if the callback ended it."""
    done = run_batches(batches, N, plan, batch_size, Watch(progress, callback))
    return batches.checked(torch.cat(done.parts))


class ModelBatches:
    """Batches of a FlowModel. inputs: those of its job, for all images; names: of these."""

    def __init__(
        self, model: FlowModel, job: Job, inputs: dict[str, Tensor], guidance: float, names: Name
    ) -> None:
        self.model, self.job, self.inputs, self.guidance = model, job, inputs, guidance
        self.names = names
        self._noted: list[Tensor] = []
        count = len(inputs["noise"])
        self.size = model.captures.size_for(job.taking(inputs), count) or count

    def run(self, rows: Tensor, monitor: StepMonitor) -> Tensor:
        return self.run_from(self.inputs["noise"][rows], rows, monitor)

    def run_from(self, start: Tensor, rows: Tensor, monitor: StepMonitor) -> Tensor:
        """`run` from other latents than the noise, (len(rows), C, H, W)."""
        inputs = {name: value[rows] for name, value in self.inputs.items() if name != "noise"}
        out = self.job.run(self.model, {"noise": start, **inputs}, self.guidance, monitor)
        if monitor.noted is not None:
            self._noted.append(monitor.noted[:, : monitor.count])
        return out

    def checked(self, result: Tensor) -> Tensor:
        """The result of all batches, if its images are finite. This reads from the device, once."""
        if not self._noted:
            return result
        return checked(torch.cat(self._noted, dim=1), result, self.model.dtypes, self.names)
