"""A machine of the test's own, to choose kernels on."""

from __future__ import annotations

import pytest
import torch
from fake_machine import FACTS, all_of_them, another_process

from flowturbo_kernels import _choices, _tune


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU that is none: its facts, candidates that say how long they take, and a cache folder."""
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    monkeypatch.setattr(_choices, "facts", lambda device: FACTS)
    monkeypatch.setattr(_tune, "timing", lambda run, sets, device: run(*sets[0]))
    monkeypatch.setattr(_tune, "rotating", all_of_them)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    another_process()
    yield tmp_path
    another_process()
