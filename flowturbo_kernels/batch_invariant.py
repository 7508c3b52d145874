"""torch functions that give an image the same bits wherever it stands in its batch.

On the CPU torch splits a tensor among threads, and the end of a thread's share that is less than a
whole vector or tile takes another code path, which rounds otherwise. So these functions pad tensors
until all shares are whole; those of published models mostly are already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_VECTORS = 64
"""Elements per step of an elementwise loop: two of the longest vectors of 16-bit numbers."""
_GRAIN = 32768
"""The fewest elements that torch's elementwise loops give one thread; GELU's uses all threads."""
_ROWS = 16
"""Rows of a matrix product: of all paddings tried with 1 to 32 threads, the smallest with which all
rows are equal (N > 1).
"""


def _pads(x: Tensor) -> bool:
    """Whether to pad: on the CPU, unless a compiler writes the loops."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _padded_size(count: int, grain: int, unit: int) -> int:
    """The least size from `count` on that torch's threads share in whole units."""
    if not isinstance(count, int):  # a symbolic shape: nothing runs
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
    if not _pads(x):
        return function(x)
    size = _padded_size(x.numel(), grain, _VECTORS)
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


_PIECE = 65536
"""Numbers per thread that GELU in bfloat16 takes through the cache at a time."""
_LINEAR = 2 * (2 / math.pi) ** 0.5
_CUBIC = 0.044715 * _LINEAR


def gelu_tanh_bfloat16(x: Tensor) -> Tensor:
    """GELU in its tanh form: x bfloat16 or float32, contiguous, which it overwrites -> bfloat16.

    As x * sigmoid(1.596 x + 0.0714 x^3), the same function in half the time: torch's tanh takes
    more than twice its sigmoid's.
    """
    flat = x.view(-1)
    count, out = (
        len(flat),
        flat if x.dtype == torch.bfloat16 else torch.empty_like(flat, dtype=torch.bfloat16),
    )
    most = _padded_size(min(count, _PIECE * torch.get_num_threads()), _GRAIN, _VECTORS)
    wide, inner = (torch.zeros(most, dtype=torch.float32, device="cpu") for _ in range(2))
    linear = torch.tensor(_LINEAR, dtype=torch.float32, device="cpu")
    for start in range(0, count, max(1, most)):
        part = flat[start : start + most]
        size = min(most, _padded_size(len(part), _GRAIN, _VECTORS))
        u, s = wide[:size], inner[:size]
        u[: len(part)].copy_(part)
        torch.addcmul(linear, u, u, value=_CUBIC, out=s)
        s.mul_(u).sigmoid_().mul_(u)
        out[start : start + most].copy_(s[: len(part)])
    return out.view(x.shape)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch has matrix products in bfloat16 for this CPU: those of oneDNN. Its own loops,
    which take over elsewhere, need eight times as long as float32's products.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # torch was built without oneDNN
        return False


def multipliable(*factors: Tensor) -> tuple[Tensor, ...]:
    """The factors, and what is added: in float32 if they are bfloat16 and on a CPU that does not
    multiply it.
    """
    if factors[0].dtype != torch.bfloat16 or factors[0].device.type != "cpu":
        return factors
    return factors if multiplies_bfloat16() else tuple(t.float() for t in factors)


def multiplied(function: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """function(*multipliable(*factors)), in the dtype of the factors."""
    multiplied_in = multipliable(*factors)
    y = function(*multiplied_in)
    return y if multiplied_in[0] is factors[0] else y.to(factors[0].dtype)


def matmul(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,) -> (..., N)."""
    if not _pads(x):
        return F.linear(x, weight, bias)
    return multiplied(_product, x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    count = x.numel() // x.shape[-1]
    size = _padded_size(count, _ROWS, _ROWS)
    if size == count:
        return F.linear(x, weight, bias)
    rows = F.pad(x.reshape(count, -1), (0, 0, 0, size - count))
    return F.linear(rows, weight, bias)[:count].unflatten(0, x.shape[:-1])
