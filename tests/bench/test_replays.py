"""A replay holds so many calls that starting it and waiting for it hardly count."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import harness

FIXED = 20e-6
"""Seconds that starting a replay and waiting for it take beside its calls."""


class Device:
    """A GPU whose calls take as long as they are said to: what is replayed moves its clock."""

    def __init__(self, seconds_a_call: float) -> None:
        self.clock, self.calls, self.alive, self.most = 0.0, 0, 0, 0
        self.seconds_a_call = seconds_a_call
        self.stream = None

    def record(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        self.calls = 0
        result, calls = run(), self.calls

        def replay() -> None:
            self.clock += FIXED + calls * self.seconds_a_call

        return result, SimpleNamespace(replay=replay)

    def call(self, *_: Any) -> Any:
        self.calls += 1
        return torch.empty(1)


@pytest.mark.parametrize("microseconds", [0.0, 1.0, 2.0, 10.0, 300.0, 5000.0])
@pytest.mark.parametrize("copies", [1, 3, 50])
def test_the_fixed_cost_of_a_replay_is_below_one_percent(microseconds, copies, monkeypatch):
    device = Device(1e-6 * microseconds)
    monkeypatch.setattr(harness, "graphs", lambda: device)
    monkeypatch.setattr(harness, "collect", lambda: None)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: device.clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    replays = harness.Replays(device.call, [()] * copies, "cuda")
    began = device.clock
    replays.run()
    took = device.clock - began
    assert replays.calls <= harness.MOST_CALLS
    assert replays.calls >= copies
    if microseconds:
        assert took / replays.calls <= 1.01 * device.seconds_a_call
    assert len(replays._kept) == copies  # results rotate as arguments do, and no more are held
    if microseconds >= 5000:
        assert replays.calls == max(8, copies)
