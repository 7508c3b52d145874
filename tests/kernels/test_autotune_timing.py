"""The timing of candidates, with a clock of the test's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_machine import GPU

from flowturbo_kernels import _measure
from flowturbo_kernels._measure import Timing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_copies_have_values_strides_and_alignment(dtype):
    memory = torch.randn(40, 40).to(dtype)
    for tensor in (
        memory,
        memory[3:],
        memory.t(),
        memory[:, 1:9],
        memory[1:, ::3],
        memory[:, :1].expand(40, 7),
        memory[0, 0],
        memory[:0],
    ):
        copy = _measure._copy(tensor)
        assert copy.float().equal(tensor.float())
        assert copy.stride() == tensor.stride()
        assert copy.data_ptr() % 16 == tensor.data_ptr() % 16 or not tensor.numel()
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def clock(monkeypatch, *said: tuple[float, bool]) -> list[float]:
    """Timings as said, the last one for ever -> the pauses that were asked for."""
    pauses: list[float] = []

    def timed(run, rounds, device, pause):
        pauses.append(pause)
        _measure._queue(run, rounds)
        return said[min(len(pauses), len(said)) - 1]

    monkeypatch.setattr(_measure, "_timed", timed)
    return pauses


def test_a_timing_takes_the_sets_in_turn(monkeypatch):
    seen: list[int] = []
    pauses = clock(monkeypatch, (2.0, False))
    assert _measure.timing(
        lambda x, y: seen.append(x), [(i, None) for i in range(30)], GPU
    ) == Timing(2.0, True)
    assert seen == [0, *list(range(30)) * (1 + len(pauses))]
    assert len(pauses) == _measure._TIMES


def test_results_are_let_go_at_once(monkeypatch):
    class Result:
        pass

    alive: weakref.WeakSet[Result] = weakref.WeakSet()

    def run() -> Result:
        result = Result()
        alive.add(result)
        assert len(alive) == 1
        return result

    clock(monkeypatch, (2.0, False))
    _measure.timing(run, [()], GPU)
    assert not alive


def test_the_fastest_of_several_timings_counts(monkeypatch):
    clock(monkeypatch, (2.2, False), (2.4, False), (2.0, False), (9.0, False), (2.1, False))
    assert _measure.timing(lambda: None, [()], GPU) == Timing(2.0, True)


def test_timings_that_vary_are_called_so(monkeypatch):
    clock(monkeypatch, (2.0, False), (2.1, False), (2.2, False), (2.0, False), (4.0, False))
    assert _measure.timing(lambda: None, [()], GPU) == Timing(2.0, False)


def test_a_device_that_began_too_soon_is_kept_waiting_for_longer(monkeypatch):
    pauses = clock(monkeypatch, (9.0, True), (8.0, True), (2.0, False))
    assert _measure.timing(lambda: None, [()], GPU) == Timing(2.0, True)
    assert pauses[:3] == [pauses[0], 2 * pauses[0], 4 * pauses[0]]
    assert len(pauses) == 2 + _measure._TIMES


def test_a_device_that_always_begins_too_soon_is_not_waited_for_for_ever(monkeypatch):
    pauses = clock(monkeypatch, (2.0, True))
    assert _measure.timing(lambda: None, [()], GPU) == Timing(2.0, False)
    assert max(pauses) < 2 * max(_measure._LONGEST, pauses[0])


def test_the_device_that_is_kept_busy_is_the_one_that_is_timed(monkeypatch):
    """Also where the caller's current device is another."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")

        query = synchronize = lambda self: False

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    @contextmanager
    def current(stream: str) -> Iterator[None]:
        log.append(f"{stream} is current")
        yield
        log.append("no more")

    fakes = {
        "current_stream": lambda device: f"stream of {device}",
        "Event": Event,
        "stream": current,
        "_sleep": lambda cycles: log.append("sleep"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(_measure, "_cycles", lambda device: 1e9)
    other = torch.device("cuda", 1)
    seconds, late = _measure._timed(lambda: log.append("run"), [(), ()], other, 0.1)
    assert (seconds, late) == (3.0 / 1e3 / 2, False)
    record = "record on stream of cuda:1"
    assert log == [
        "stream of cuda:1 is current", "sleep", record, "run", "run", record, "no more"
    ]  # fmt: skip
