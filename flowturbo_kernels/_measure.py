"""How long a call takes on a CUDA device, with weights that are not in its cache, without
disturbing other threads.

Nothing is captured: during a capture, whatever its mode, no other thread may synchronise the device
or draw its random numbers. Instead the device is kept busy until all calls are queued, so that it
runs them back to back, as in a graph. The host waits for an event alone, which is allowed while
another thread captures. Everything is queued on the caller's current stream: another stream would
cost a cuBLAS workspace, and memory that only that stream can reuse.
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
"""In one timing, at least."""
_TIMES = 7
_STEADY = 1.25
"""Three quarters of the timings must be within this factor of the fastest, or it is not kept."""
_LONGEST = 0.1
"""Seconds for which the device is kept busy while calls are queued, at most."""
_TIMES_CACHE = 3
"""How many times the size of the L2 cache the rotating weights have."""
_MOST_COPIES = 64
"""A network has about as many products: where more copies were needed, a network's own weights
would stay in the cache, too.
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
    """Of run(*arguments), over the sets of arguments in turn. Results are freed at once."""
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
    """(seconds per call, whether the device began before the last call was queued, so that it may
    have waited for the host).
    """
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):  # the caller's current device may be another
        torch.cuda._sleep(int(pause * _cycles(device)))
        start.record(stream)
        _queue(run, rounds)
        late = start.query()
        end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(rounds), late


@functools.cache
def _cycles(device: torch.device) -> float:
    """Per second, at most."""
    return 1e3 * getattr(torch.cuda.get_device_properties(device), "clock_rate", 2e6)


@contextmanager
def rotating(
    cold: tuple[Tensor, ...], device: torch.device
) -> Iterator[tuple[list[tuple[Tensor, ...]], bool]]:
    """(sets of arguments, whether they are enough): `cold` itself, and copies that together exceed
    the L2 cache.

    They take a quarter of the free memory at most, and leave it to torch's allocator for the
    stream's next tensors: a pool of their own could not be freed while another thread captures.
    """
    bytes_a_set = sum(t.nbytes for t in cold)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(_MOST_COPIES, -(-_TIMES_CACHE * cache // max(1, bytes_a_set))) if cold else 1
    free, _ = torch.cuda.mem_get_info(device)
    allowed = min(count, 1 + free // 4 // max(1, bytes_a_set))
    sets = [cold]
    try:
        try:
            sets += [tuple(map(_copy, cold)) for _ in range(allowed - 1)]
        except torch.cuda.OutOfMemoryError:  # other threads took it
            allowed = 0
        yield sets, allowed >= count
    finally:
        sets.clear()


def _copy(tensor: Tensor) -> Tensor:
    """In other memory, with the same strides and alignment, which kernels are specialised on."""
    span = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    memory = torch.empty(offset + span, dtype=tensor.dtype, device=tensor.device)
    memory[offset:].copy_(tensor.as_strided((span,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), offset)
