"""How every rival is called: the sampler's loop over the subject's noise and labels, with cuDNN's
convolutions tuned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from subjects import Subject
from torch import Tensor
from tqdm.auto import tqdm

import flowturbo as ft
from flowturbo.models.flow_model import FlowModel
from flowturbo.sampling.run import Job, StepMonitor


@dataclass(frozen=True)
class Sampler:
    """A plan -> the subject's batch sampled by it, decoded where the subject is. The first call may
    compile and capture.

    run: (subject, plan) -> the batch. model: whose networks are called. settings: in words, what
        was chosen for it here, for the table.
    """

    subject: Subject
    run: Callable[[Subject, str], Tensor]
    model: FlowModel
    settings: str = ""

    def __call__(self, plan: str) -> Tensor:
        with tuned_convolutions():
            return self.run(self.subject, plan)

    def latents(self, plan: str) -> Tensor:
        """What the call decodes."""
        with tuned_convolutions():
            return self.run(replace(self.subject, decode=False), plan)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """cuDNN times its algorithms for each convolution that this thread has not met before, and
    keeps the fastest.

    It keeps what it took without timing as well: whoever runs one of the rivals' convolutions
    outside of this takes the choice away from those that come after. Timing is not allowed in a
    capture; before each there is a run as it is, on the same thread, which leaves nothing to be
    timed.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@torch.no_grad()
def sample(model: FlowModel, s: Subject, plan: str, kind: type[Job] = Job) -> Tensor:
    """What flowturbo.sample does for a batch once its arguments are checked: all is on the device
    already.
    """
    job = _job(s, model, plan, kind)
    with tqdm(disable=True) as bar:
        return job.run(
            model,
            {"noise": s.noise, "labels": s.labels},
            s.guidance,
            StepMonitor(job.plan, 0, s.batch, bar, None),
        )


def _job(s: Subject, model: FlowModel, plan: str, kind: type[Job]) -> Job:
    return kind.of(model, ft.Plan.parse(plan), s.guidance, None, s.output, torch.float32)


def plainly(s: Subject, model: FlowModel, settings: str = "") -> Sampler:
    return Sampler(s, functools.partial(sample, model), model, settings)


def captured(s: Subject, model: FlowModel, settings: str = "", kind: type[Job] = Job) -> Sampler:
    """By a capture of the whole plan, made ahead of time. That of another plan is given up before:
    what memory is counted is this plan's alone.
    """
    newest: tuple[str, bool] | None = None

    def run(s: Subject, plan: str) -> Tensor:
        nonlocal newest
        if newest != (plan, s.decode):
            newest = None
            model.captures.clear()
            _capture(s, model, plan, kind)
            newest = plan, s.decode
        return sample(model, s, plan, kind)

    return Sampler(s, run, model, settings)


@torch.no_grad()
def _capture(s: Subject, model: FlowModel, plan: str, kind: type[Job]) -> None:
    job = _job(s, model, plan, kind)
    if job.can_be_captured(model):
        model.captures.precapture(
            *job.capture(model, {"noise": s.noise, "labels": s.labels}, s.guidance)
        )


class AnyJob(Job):
    """A job of networks that `sample` would not capture: it can't know that they do the same work
    whatever the images.
    """

    def can_be_captured(self, model: FlowModel) -> bool:
        return model.captures.possible(model.device)
