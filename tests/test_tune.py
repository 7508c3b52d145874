"""The choice by measurement: with a clock and a device of the test's own."""

from __future__ import annotations

import json

import pytest
import torch

from flowturbo_kernels import _tune

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU that is none: its name, the seconds that candidates say they take, and a cache folder."""
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    monkeypatch.setattr(_tune, "_device_name", lambda device: "GPU / 1")
    monkeypatch.setattr(_tune, "seconds", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    _tune._remembered.cache_clear()
    yield tmp_path
    _tune._remembered.cache_clear()


def timed(log: list[str], **times: float):
    def candidate(name: str):
        def run() -> float:
            log.append(name)
            return times[name]

        return run

    return {name: candidate(name) for name in times}


def test_the_fastest_is_measured_once_and_remembered_on_disk(machine):
    log: list[str] = []
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0, c=2.0), GPU) == "b"
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0, c=2.0), GPU) == "b"
    assert log == ["a", "b", "c"]
    _tune._remembered.cache_clear()  # another process
    assert _tune.fastest("op 1", timed(log, a=0.1, b=9.0, c=2.0), GPU) == "b"
    assert log == ["a", "b", "c"]
    (file,) = machine.iterdir()
    assert "GPU---1" in file.name
    assert torch.__version__ in file.name
    assert json.loads(file.read_text()) == {"op 1": "b"}


def test_another_shape_is_measured_anew(machine):
    assert _tune.fastest("op 1", timed([], a=1.0, b=2.0), GPU) == "a"
    assert _tune.fastest("op 2", timed([], a=3.0, b=2.0), GPU) == "b"


def test_nothing_is_measured_in_a_capture(machine, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0), GPU) == "a"
    assert log == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0), GPU) == "b"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU) == "b"


def test_nothing_is_measured_on_the_cpu(machine):
    log: list[str] = []
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0), torch.device("cpu")) == "a"
    assert log == []


def test_a_candidate_that_fails_is_not_taken(machine):
    def broken() -> float:
        raise RuntimeError("out of resources")

    assert _tune.fastest("op 1", {"a": broken, **timed([], b=5.0)}, GPU) == "b"
    assert _tune.fastest("op 2", {"a": broken, "b": broken}, GPU) == "a"


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe", b'{"op 1": "gone"}'])
def test_a_damaged_or_stale_file_is_measured_over(machine, damage):
    _tune._file(GPU).write_bytes(damage)
    assert _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU) == "b"
    assert json.loads(_tune._file(GPU).read_text())["op 1"] == "b"


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(machine, monkeypatch):
    (machine / "file").write_text("")
    monkeypatch.setenv("FLOWTURBO_CACHE", str(machine / "file"))
    _tune._remembered.cache_clear()
    assert _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU) == "b"
