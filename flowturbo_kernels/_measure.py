"""How long a call takes on a CUDA device, on weights that are not in its cache, and without harm to
other threads.

Nothing is captured: while a capture is under way, whatever its mode, no other thread may wait for
the device or draw its random numbers. Instead the device is kept busy until all calls are queued,
so that it runs them one after another, as in a graph. Nothing but an event is waited for, which a
thread beside one that captures may do. All is queued on the caller's stream: another one would cost
a workspace of cuBLAS, and memory that no other stream takes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CALLS = 20
"""In one timing, at the least."""
_TIMES = 7
_STEADY = 1.25
"""How much slower than the fastest timing three quarters of them may be: a chosen limit."""
_LONGEST = 0.1
"""Seconds for which the device is kept waiting for calls to be queued, at the most."""
_TIMES_CACHE = 3
"""How many times the size of the L2 cache the rotating weights have."""
_MOST_COPIES = 64
"""A network has about as many products: where more would be needed, its weights lie in the cache in
earnest as well.
"""


class Timing(NamedTuple):
    """seconds: of one call, the fastest of several timings. steady: whether most of them were about
    as fast.
    """

    seconds: float
    steady: bool


def timing(
    run: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]], device: torch.device
) -> Timing:
    """Of run(*arguments), which takes the sets of arguments in turn. Results are let go at once."""
    rounds = [sets[i % len(sets)] for i in range(max(_CALLS, len(sets)))]
    run(*rounds[0])  # compiles
    began = time.perf_counter()
    _queue(run, rounds)
    pause = 1e-4 + 1.5 * (time.perf_counter() - began)
    times: list[float] = []
    in_time = True
    while len(times) < _TIMES:
        seconds, late = _timed(run, rounds, device, pause)
        if late and pause < _LONGEST:
            pause *= 2
            continue
        times.append(seconds)
        in_time &= not late
    times.sort()
    return Timing(times[0], in_time and times[3 * _TIMES // 4] <= _STEADY * times[0])


def _queue(run: Callable[..., Any], rounds: Sequence[tuple[Tensor, ...]]) -> None:
    for arguments in rounds:
        run(*arguments)


def _timed(
    run: Callable[..., Any],
    rounds: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    pause: float,
) -> tuple[float, bool]:
    """(seconds a call, whether the device began before the last call was queued, and so may have
    waited for it).
    """
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(pause * _cycles(device)))
    start.record(stream)
    _queue(run, rounds)
    late = start.query()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(rounds), late


@functools.cache
def _cycles(device: torch.device) -> float:
    """A second's, at most."""
    return 1e3 * getattr(torch.cuda.get_device_properties(device), "clock_rate", 2e6)


@contextmanager
def rotating(
    cold: tuple[Tensor, ...], device: torch.device
) -> Iterator[tuple[list[tuple[Tensor, ...]], bool]]:
    """(sets of arguments, whether there are as many as it takes): the given ones, and copies that
    together outgrow the L2 cache.

    A quarter of the free memory is taken at most, and left to torch's allocator at the end, for the
    stream's next tensors: a pool of its own can't be ended while another thread captures.
    """
    bytes_a_set = sum(t.nbytes for t in cold)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = min(_MOST_COPIES, -(-_TIMES_CACHE * cache // max(1, bytes_a_set))) if cold else 1
    free, _ = torch.cuda.mem_get_info(device)
    allowed = min(wanted, 1 + free // 4 // max(1, bytes_a_set))
    sets = [cold]
    try:
        try:
            sets += [tuple(map(_copy, cold)) for _ in range(allowed - 1)]
        except torch.cuda.OutOfMemoryError:  # others were quicker
            allowed = 0
        yield sets, allowed >= wanted
    finally:
        sets.clear()


def _copy(tensor: Tensor) -> Tensor:
    """In other memory, of the same strides and alignment, by which kernels are compiled and
    chosen.
    """
    span = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    memory = torch.empty(offset + span, dtype=tensor.dtype, device=tensor.device)
    memory[offset:].copy_(tensor.as_strided((span,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), offset)
