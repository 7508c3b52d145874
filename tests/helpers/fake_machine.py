"""A machine of the test's own: kernels that take as long as it says."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from flowturbo_kernels import _choices, _tune
from flowturbo_kernels._measure import Timing
from flowturbo_kernels._tune import Candidates

GPU = torch.device("cuda", 0)
FACTS = {"device": "GPU / 1", "torch": torch.__version__, "triton": "3", "clock_rate": 1980000}


@contextmanager
def all_of_them(cold, device):
    yield [cold], True


@contextmanager
def too_few(cold, device):
    yield [cold], False


def another_process() -> None:
    _tune._in_memory.clear()
    _tune._on_disk.clear()


def timed(log: list[str], **times: float | Exception | Timing):
    def candidate(name: str, says: float | Exception | Timing):
        def run() -> Timing:
            log.append(name)
            if isinstance(says, Exception):
                raise says
            return says if isinstance(says, Timing) else Timing(says, True)

        return run

    return {name: candidate(name, says) for name, says in times.items()}


def fastest(question: str, candidates) -> str:
    return _tune.fastest(Candidates((question,), candidates, GPU))


def on_disk() -> dict[str, _choices.Entry]:
    """By question alone."""
    return {key.split(" |")[0]: entry for key, entry in _choices.read(FACTS).items()}
