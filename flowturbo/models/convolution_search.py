"""cuDNN's search for the fastest convolutions, where captures allow it.

torch.backends.cudnn.benchmark is for the whole process, and a search synchronises the device, which
breaks a capture in any thread. But torch keeps what it found, for each thread and shape, and uses
it whatever that setting is. So it is enough to search when a thread first runs a network on a
shape, which is never inside a capture: a run of the same shape comes before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowturbo_kernels.graphs import RECORDING

_of_thread = threading.local()
"""Networks, with what they were run on in this thread."""


@contextmanager
def convolution_search(network: nn.Module, x: Tensor) -> Iterator[None]:
    """A run of the network on x, whose convolutions are searched for if it is this thread's first
    on that shape; no other thread captures meanwhile.

    Nothing is searched for off CUDA, in a capture, and where the user asks for deterministic
    convolutions or has set torch.backends.cudnn.benchmark himself.
    """
    if not _may_search(x):
        yield
        return
    known = _of_thread.__dict__.setdefault("known", weakref.WeakKeyDictionary())
    shapes = known.setdefault(network, set())
    shape = x.device, x.dtype, tuple(x.shape), torch.backends.cudnn.allow_tf32
    if shape in shapes:
        yield
        return
    with RECORDING:
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False
    shapes.add(shape)


def _may_search(x: Tensor) -> bool:
    return not (
        x.device.type != "cuda"
        or torch.backends.cudnn.benchmark
        or torch.backends.cudnn.deterministic
        or torch.are_deterministic_algorithms_enabled()
        or torch.cuda.is_current_stream_capturing()
        or torch.compiler.is_compiling()
    )
