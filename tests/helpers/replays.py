"""Operations inside a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from close import assert_equal
from ops import tensors

from flowturbo_kernels import OPS, use_backend


def assert_replays(name: str, args: Any, new: Any, backend: str) -> None:
    """A captured operation gives, bit by bit, what an eager one does when its inputs are `new`.

    args, new: the operation's arguments twice, on a CUDA device; args are overwritten.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with use_backend(backend), torch.no_grad():
        with torch.cuda.stream(stream):
            OPS[name](*args)
            eager = tensors(OPS[name](*new))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = tensors(OPS[name](*args))
    for old, fresh in zip(tensors(args), tensors(new), strict=True):
        old.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager, strict=True):
        assert_equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
