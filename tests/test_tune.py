"""The choice by measurement: with a clock and a device of the test's own."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from flowturbo_kernels import _cache, _tune

GPU = torch.device("cuda", 0)


class TritonError(Exception):
    """As Triton raises it where a kernel does not fit the device."""


TritonError.__module__ = "triton.runtime.errors"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU that is none: what it is, the seconds that candidates say they take, and a cache folder."""
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    monkeypatch.setattr(_tune, "_facts", lambda device: (("device", "GPU / 1"), ("torch", torch.__version__)))
    monkeypatch.setattr(_tune, "timings", lambda run, rotating, device: _rounds(run(*rotating[0])))
    monkeypatch.setattr(_tune, "copies", lambda cold, device: [tuple(cold)])
    monkeypatch.setattr(_tune, "_give_back", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget()
    yield tmp_path
    forget()


def _rounds(said) -> list[float]:
    return list(said) if isinstance(said, tuple) else [said]


def forget() -> None:
    """As another process begins."""
    _tune._known.clear()


def timed(log: list[str], **times):
    def candidate(name: str):
        def run():
            log.append(name)
            return times[name]

        return run

    return {name: candidate(name) for name in times}


def broken(error: Exception):
    def run():
        raise error

    return run


def written(folder: Path) -> dict[str, str]:
    return {key: choice for file in folder.glob("*.json") for key, choice in json.loads(file.read_text())["fastest"].items()}


def test_the_fastest_is_measured_once_and_remembered_on_disk(machine):
    log: list[str] = []
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0, c=2.0), GPU) == "b"
    assert _tune.fastest("op 1", timed(log, a=3.0, b=1.0, c=2.0), GPU) == "b"
    assert log == ["a", "b", "c"]
    forget()
    assert _tune.fastest("op 1", timed(log, a=0.1, b=9.0, c=2.0), GPU) == "b"
    assert log == ["a", "b", "c"]
    (file,) = machine.glob("*.json")
    assert "GPU---1" in file.name
    found = json.loads(file.read_text())
    assert found["of"] == {"device": "GPU / 1", "torch": torch.__version__}
    assert list(found["fastest"].values()) == ["b"]
    assert next(iter(found["fastest"])).startswith("op 1, ")


def test_another_shape_is_measured_anew(machine):
    assert _tune.fastest("op 1", timed([], a=1.0, b=2.0), GPU) == "a"
    assert _tune.fastest("op 2", timed([], a=3.0, b=2.0), GPU) == "b"


def test_other_candidates_are_another_question(machine):
    """Who asks without torch's product must not decide for those who have it, nor the other way round."""
    every = dict(torch=1.0, tile=2.0, other=3.0)
    tiles = {name: seconds for name, seconds in every.items() if name != "torch"}
    assert [_tune.fastest("op 1", timed([], **given), GPU) for given in (every, tiles, every)] == ["torch", "tile", "torch"]
    forget()
    assert [_tune.fastest("op 1", timed([], **given), GPU) for given in (tiles, every, tiles)] == ["tile", "torch", "tile"]
    assert sorted(written(machine).values()) == ["tile", "torch"]


def test_float32s_precision_is_part_of_the_question(machine):
    log: list[str] = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            _tune.fastest("op 1", timed(log, a=1.0, b=2.0), GPU)
    finally:
        torch.set_float32_matmul_precision(before)
    assert log == ["a", "b"] * 2


@pytest.mark.parametrize("which", ["device", "clocks", "torch", "triton", "kernels", "memory, GiB"])
def test_whatever_decides_makes_a_file_of_its_own(machine, monkeypatch, which):
    files = set()
    for value in ("one", "another"):
        facts = {"device": "GPU", "clocks": "1", "torch": "2", "triton": "3", "kernels": "4", "memory, GiB": "5"} | {which: value}
        monkeypatch.setattr(_tune, "_facts", lambda device, facts=facts: tuple(facts.items()))
        files.add(_tune._file(GPU))
    assert len(files) == 2


def test_a_changed_kernel_is_another_fact(tmp_path, monkeypatch):
    (tmp_path / "op.py").write_text("a = 1\n")
    monkeypatch.setattr(_tune, "__file__", str(tmp_path / "_tune.py"))
    before = _tune._kernels()
    assert _tune._kernels() == before
    (tmp_path / "op.py").write_text("a = 2\n")
    assert _tune._kernels() != before


def test_a_long_name_of_a_device_fits_a_file_system(machine, monkeypatch):
    monkeypatch.setattr(_tune, "_facts", lambda device: (("device", "GPU / " * 100),))
    assert len(_tune._file(GPU).name.encode()) < 200
    assert _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU) == "b"
    assert written(machine)


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


def test_what_was_taken_is_told(machine):
    with _tune.choices() as outer:
        _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU)
        with _tune.choices() as inner:
            _tune.fastest("op 2", timed([], only=1.0), GPU)
    assert (outer, inner) == (["b", "only"], ["only"])


# Failures


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal address"), ValueError("?")]
)
def test_a_failure_that_may_pass_leaves_nothing_on_disk(machine, error):
    candidates = {"a": broken(error), **timed([], b=5.0, c=6.0)}
    assert _tune.fastest("op 1", candidates, GPU) == "b"
    assert written(machine) == {}
    assert _tune.fastest("op 1", candidates, GPU) == "b"  # known to this process
    forget()
    assert _tune.fastest("op 1", timed([], a=1.0, b=5.0, c=6.0), GPU) == "a"
    assert list(written(machine).values()) == ["a"]


def test_a_kernel_that_does_not_fit_the_device_is_a_fact_that_is_kept(machine):
    assert _tune.fastest("op 1", {"a": broken(TritonError("out of resource")), **timed([], b=5.0)}, GPU) == "b"
    assert list(written(machine).values()) == ["b"]


def test_where_all_fail_the_default_is_taken_and_nothing_kept(machine):
    every = {"a": broken(TritonError("out of resource")), "b": broken(TritonError("out of resource"))}
    assert _tune.fastest("op 2", every, GPU) == "a"
    assert written(machine) == {}


def test_timings_of_a_crowded_gpu_are_not_kept(machine):
    assert _tune.fastest("op 1", timed([], a=(1.0, 1.9, 2.0), b=(3.0, 3.0, 3.0)), GPU) == "a"
    assert written(machine) == {}
    assert _tune.fastest("op 2", timed([], a=(1.0, 1.1, 9.0), b=(3.0, 3.0, 3.0)), GPU) == "a"
    assert list(written(machine).values()) == ["a"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b"\xff\xfe", b'{"op 1": "gone"}', b'{"fastest": 3}', b'{"fastest": {"op 1": "gone"}}']
)
def test_a_damaged_or_stale_file_is_measured_over(machine, damage):
    _tune._file(GPU).write_bytes(damage)
    assert _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU) == "b"
    assert "b" in written(machine).values()


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(machine, monkeypatch):
    (machine / "file").write_text("")
    monkeypatch.setenv("FLOWTURBO_CACHE", str(machine / "file"))
    forget()
    assert _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU) == "b"


# Others at the same time


def test_threads_that_ask_the_same_measure_once(machine):
    log: list[str] = []
    entered, go = threading.Event(), threading.Event()

    def slow() -> float:
        log.append("a")
        entered.set()
        go.wait()
        return 1.0

    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(_tune.fastest("op 1", {"a": slow, **timed(log, b=2.0)}, GPU)))
        for _ in range(2)
    ]
    threads[0].start()
    entered.wait()
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join()
    assert answers == ["a", "a"]
    assert log == ["a", "b"]


def test_what_another_process_wrote_meanwhile_stays_and_is_learnt(machine):
    _tune.fastest("op 1", timed([], a=3.0, b=1.0), GPU)
    file = _tune._file(GPU)
    found = json.loads(file.read_text())
    other = next(iter(found["fastest"])).replace("op 1", "op 2")
    found["fastest"][other] = "a"
    file.write_text(json.dumps(found))
    _tune.fastest("op 3", timed([], a=3.0, b=1.0), GPU)
    assert sorted(k[:4] for k in written(machine)) == ["op 1", "op 2", "op 3"]
    log: list[str] = []
    assert _tune.fastest("op 2", timed(log, a=3.0, b=1.0), GPU) == "a"
    assert log == []


def _add(path: Path, start, name: str) -> None:
    start.wait()
    for i in range(20):
        with _cache.locked(path):
            there = json.loads(path.read_text()) if path.exists() else []
            _cache.whole_file(path, json.dumps([*there, f"{name} {i}"]).encode())


def test_two_processes_that_write_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    start, path = context.Event(), tmp_path / "folder" / "file.json"
    processes = [context.Process(target=_add, args=(path, start, name)) for name in "ab"]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert sorted(json.loads(path.read_text())) == sorted(f"{name} {i}" for name in "ab" for i in range(20))


# Cold weights


def test_weights_rotate_over_several_times_the_cache_within_the_memory_that_is_free(monkeypatch):
    class Properties:
        L2_cache_size = 1 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    free = [1 << 40]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    weight = torch.randn(64, 1024)  # a quarter of the cache
    made = _tune.copies([weight], GPU)
    assert len(made) == 16
    assert made[0][0] is weight
    assert len({t[0].data_ptr() for t in made}) == 16
    assert all(t[0].equal(weight) for t in made)
    free[0] = 8 * weight.numel() * 4
    assert len(_tune.copies([weight], GPU)) == 5
    free[0] = 0
    assert len(_tune.copies([weight], GPU)) == 1
    assert _tune.copies([], GPU) == [()]
