"""How every rival is called: flowturbo.sample on the subject's noise and labels, with cuDNN's convolutions tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import flowturbo as ft
from flowturbo.job import Job
from flowturbo.models import FlowModel
from flowturbo.sampler import ModelBatches, in_batches, inputs_of

if TYPE_CHECKING:
    from rivals import Subject


@dataclass(frozen=True)
class Sampler:
    """A plan -> a batch sampled by it. The first call may compile and capture.

    model: whose networks are called. settings: in words, what was chosen for it here, for the table.
    """

    run: Callable[[str], Tensor]
    model: FlowModel
    settings: str = ""

    def __call__(self, plan: str) -> Tensor:
        with tuned_convolutions():
            return self.run(plan)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """cuDNN times its algorithms for each convolution that this thread has not met before, and keeps the fastest.

    It keeps what it took without timing as well: whoever runs one of the rivals' convolutions outside of this takes the choice away
    from those that come after. Timing is not allowed in a capture; before each there is a run as it is, on the same thread, which
    leaves nothing to be timed.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def sample(s: Subject, model: FlowModel, plan: str) -> Tensor:
    return ft.sample(model, plan, s.labels, guidance=s.guidance, noise=s.noise, batch_size=s.batch, output=s.output)


def plainly(s: Subject, model: FlowModel, settings: str = "") -> Sampler:
    return Sampler(functools.partial(sample, s, model), model, settings)


def captured(s: Subject, model: FlowModel, settings: str = "") -> Sampler:
    """By a capture of the whole plan, made ahead of time as its users make it."""

    def capture(plan: str) -> None:
        ft.compile(model, plan, s.batch, output=s.output)

    return _one_at_a_time(capture, functools.partial(sample, s, model), model, settings)


def captured_anyway(s: Subject, model: FlowModel, settings: str = "") -> Sampler:
    """The same for networks that `sample` would not capture, since it can't know that they do the same work whatever the images."""

    @torch.no_grad()
    def capture(plan: str) -> None:
        inputs = {"noise": s.noise, "labels": s.labels}
        model.captures.ahead(*_job(s, model, plan).capture(model, inputs, s.guidance))

    @torch.no_grad()
    def run(plan: str) -> Tensor:  # what ft.sample does, line by line, but for the job's kind
        job = _job(s, model, plan)
        inputs = inputs_of(model, s.labels, s.guidance, s.noise, None)
        return in_batches(ModelBatches(model, job, inputs, s.guidance), s.batch, job.plan, s.batch, False, None)

    return _one_at_a_time(capture, run, model, settings)


def _one_at_a_time(capture: Callable[[str], None], run: Callable[[str], Tensor], model: FlowModel, settings: str) -> Sampler:
    """The capture of another plan is given up before one is made: what memory is counted is this plan's alone."""
    newest = ""

    def sampled(plan: str) -> Tensor:
        nonlocal newest
        if plan != newest:
            newest = ""
            model.captures.clear()
            capture(plan)
            newest = plan
        return run(plan)

    return Sampler(sampled, model, settings)


class _AnyJob(Job):
    def can_be_captured(self, model: FlowModel) -> bool:
        return model.captures.possible(model.device)


def _job(s: Subject, model: FlowModel, plan: str) -> _AnyJob:
    return _AnyJob.of(model, ft.Plan.parse(plan), s.guidance, None, s.output, torch.float32)
