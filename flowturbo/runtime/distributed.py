"""Processes that work together under torchrun: the device of each, and what one of them finds told
to all.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Before there is a group: its default arguments would hold that to the end.
import torch.distributed.nn.functional

from .device import choose_device

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for another that is alive. One that died is noticed at once, since its
connections close.
"""


@contextlib.contextmanager
def workers(device: str | None) -> Iterator[torch.device]:
    """The device of this process; under torchrun, in a process group for as long as the block
    lasts.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield choose_device(device)
        return
    place = choose_device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if (
        dist.is_initialized()
    ):  # the caller's group: a second one in a process meets the first one's addresses and may hang
        yield place
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()


class Team:
    """The processes of the group, or this one alone, for work that each does on its own between few
    agreements. Used by `with`.

    A group has threads of torch's, and one of them that lets go of a tensor while the interpreter
    ends aborts the process. So the group must have ended by then, and no error that leaves here may
    keep it alive.
    """

    _group: dist.ProcessGroup | None = None

    def __init__(self) -> None:
        self.rank, self.size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        # Through gloo whatever the group is of: nothing but words is exchanged, and nccl's waiting
        # occupies the GPU.
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def from_rank0(self, find: Callable[[], T]) -> T:
        """What `find` returns in process 0, in all; what it raises there, all raise. None goes on
        before it is found.
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
        found, refused = outcome
        del outcome
        if refused is not None:
            try:
                raise refused
            finally:
                del refused  # or its traceback would hold this frame, and this frame it
        return cast(T, found)

    def barrier(self) -> None:
        """Wait until all have come here. RuntimeError if one ended before."""
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
