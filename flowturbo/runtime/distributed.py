"""Processes that work together under torchrun: their devices, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Imported before there is a group: its default arguments would keep a group alive to the end.
import torch.distributed.nn.functional

from .device import choose_device

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for another. A process that dies is noticed at once, since its
connections close.
"""


def is_launched() -> bool:
    """Whether this process is one of several that find each other, as under torchrun.

    A cluster may set RANK and WORLD_SIZE for a single process, without an address: that one works
    alone. Raises ValueError if there are several and no address, or for what is no number.
    """
    number, size = _setting("RANK"), _setting("WORLD_SIZE")
    if number is None or size is None:
        return False
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not lacking or dist.is_initialized():
        return True
    if size > 1:
        raise ValueError(
            f"RANK={number} and WORLD_SIZE={size} are set, so this is one of {size} processes, but "
            f"{' and '.join(lacking)} not: start with torchrun, or unset RANK and WORLD_SIZE"
        )
    return False


def process_number() -> int:
    """The number of this process among those that were launched together; 0 if it is alone."""
    number = _setting("RANK")
    return number if number is not None and is_launched() else 0


def _local_number() -> int:
    """The number of this process's GPU in its machine."""
    local = _setting("LOCAL_RANK")
    if local is None:
        return (_setting("RANK") or 0) % torch.cuda.device_count()
    return local


def _setting(name: str) -> int | None:
    """A number of the environment; None if it is not there, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"the environment's {name} must be a number, got {text!r}")
    return int(text)


@contextlib.contextmanager
def workers(device: str | None) -> Iterator[torch.device]:
    """The device of this process; under torchrun, inside a process group.

    The group lasts as long as the block. A group that exists already is used as it is.
    """
    target, launched = choose_device(device), is_launched()
    if not launched:
        yield target
        return
    if target.type == "cuda":
        target = torch.device("cuda", _local_number())
        torch.cuda.set_device(target)
    if dist.is_initialized():
        # The caller's group. A second one in the same process may hang on the first one's ports.
        yield target
        return
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield target
    finally:
        dist.destroy_process_group()


class Team:
    """The processes of a group, or this process alone. Use it in a `with` block.

    Each process works on its own, and they agree only at a few points. A gloo group has threads of
    torch's, and the process aborts if one of them frees a tensor while the interpreter exits. So
    the group ends with the block, and no error that leaves the block may keep a reference to it.
    """

    _group: dist.ProcessGroup | None = None

    def __init__(self) -> None:
        self.rank, self.size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        # gloo even beside nccl: only small objects are exchanged, and waiting in nccl occupies the
        # GPU.
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def from_rank0(self, find: Callable[[], T]) -> T:
        """Call `find` in process 0, and return its result in every process.

        If it raises, every process raises the same error. All processes wait for the result.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = find()
            except Exception as error:
                outcome[1] = error
        if self._group is not None:
            with self._noticing():
                dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, failure = outcome
        del outcome
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or its traceback would hold this frame, and this frame it
        return cast(T, result)

    def barrier(self) -> None:
        """Wait until all processes are here. RuntimeError if one has ended."""
        if self._group is not None:
            with self._noticing():
                dist.barrier(self._group)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # torch's, which hold the group
            raise RuntimeError(
                "another process of this run has ended: start the same command again to go on"
            ) from error
