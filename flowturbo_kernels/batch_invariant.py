"""torch functions whose result does not depend, to the last bit, on where in its batch an image
stands.

On the CPU torch hands each thread a share of a tensor, and rounds what is left over at the end of a
share, less than a whole vector or tile, by another path. So tensors are filled up here until all
shares are whole; those of published models mostly are already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_VECTORS = 64  # elements of an elementwise loop: the two longest vectors of 16-bit numbers
# elements that torch's elementwise loops give one thread at the least; GELU's takes all threads
_GRAIN = 32768
# rows of a matrix product: of every filling tried with 1 to 32 threads, the smallest that made all
# rows equal (N > 1)
_ROWS = 16


def _fills(x: Tensor) -> bool:
    """Whether there are shares to fill: on the CPU, unless a compiler will write the loops."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _filled(count: int, grain: int, unit: int) -> int:
    """The least size from `count` on that torch's threads share in whole units."""
    if not isinstance(count, int):  # a symbol: nothing runs, a shape is being derived
        return count
    return _whole_shares(count, grain, unit, torch.get_num_threads())


@functools.cache
def _whole_shares(count: int, grain: int, unit: int, threads: int) -> int:
    size = count
    while True:
        shares = max(1, min(threads, -(-size // grain)))
        missing = -size % (unit * shares)
        if not missing:
            return size
        size += missing


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor, grain: int = _GRAIN) -> Tensor:
    """function(x), for an elementwise function; x of any shape -> the same shape."""
    if not _fills(x):
        return function(x)
    size = _filled(x.numel(), grain, _VECTORS)
    if size == x.numel():
        return function(x.contiguous())
    flat = F.pad(x.reshape(-1), (0, size - x.numel()))
    return function(flat)[: x.numel()].view(x.shape)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return elementwise(F.silu, x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return elementwise(lambda flat: F.gelu(flat, approximate="tanh"), x, grain=1)


def matmul(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,) -> (..., N)."""
    if not _fills(x):
        return F.linear(x, weight, bias)
    count = x.numel() // x.shape[-1]
    size = _filled(count, _ROWS, _ROWS)
    if size == count:
        return F.linear(x, weight, bias)
    rows = F.pad(x.reshape(count, -1), (0, 0, 0, size - count))
    return F.linear(rows, weight, bias)[:count].unflatten(0, x.shape[:-1])
