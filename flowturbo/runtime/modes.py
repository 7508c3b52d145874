"""Modes of the caller's that the library does not heed: what a model computes depends on its own
dtype and device, and on what was asked for.

torch's default dtype is of the whole process, so it is never changed: tensors are made with a dtype
of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast is off for this kind of device."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@contextmanager
def own_modes() -> Iterator[None]:
    """A block, or the body of a function, with gradients, and without inference mode, autocast and
    a default device: for training, and for code of other libraries that makes networks.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(without_autocast(torch.device(kind)))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
