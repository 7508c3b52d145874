"""The file of measured choices: what is kept, what is refused, and who else writes it."""

from __future__ import annotations

import errno
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_machine import FACTS, GPU, another_process, fastest, on_disk, timed, too_few

from flowturbo_kernels import BackendError, _cache, _choices, _tune
from flowturbo_kernels._measure import Timing
from flowturbo_kernels._tune import Candidates


class OutOfResources(Exception):
    """As Triton's, which need not be there."""


OF_THE_MOMENT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    OSError("no space left on device"),
    RuntimeError(),
]
LASTING = [
    OutOfResources(
        "out of resource: shared memory, Required: 245760, Hardware limit: 232448.\nReducing "
        "block sizes may help."
    ),
    BackendError("linear: triton was asked for, but: M must be at most 8"),
    NotImplementedError("no such kernel"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
    RuntimeError(
        "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9"
    ),
]


@pytest.mark.parametrize("error", OF_THE_MOMENT, ids=str)
def test_a_failure_of_the_moment_leaves_nothing_on_disk(machine, error):
    log: list[str] = []
    assert fastest("op 1", timed(log, a=error, b=5.0, c=6.0)) == "b"
    assert on_disk() == {}
    assert fastest("op 1", timed(log, a=1.0, b=5.0, c=6.0)) == "b"
    assert log == ["a", "b", "c"]
    another_process()
    assert fastest("op 1", timed(log, a=1.0, b=5.0, c=6.0)) == "a"
    assert on_disk()["op 1"]["fastest"] == "a"


@pytest.mark.parametrize("error", LASTING, ids=str)
def test_what_can_never_run_is_tried_once(machine, error):
    log: list[str] = []
    assert fastest("op 1", timed(log, a=error, b=5.0)) == "b"
    another_process()
    assert fastest("op 1", timed(log, a=error, b=5.0)) == "b"
    assert log == ["a", "b"]
    assert on_disk()["op 1"]["cannot"] == {
        "a": f"{type(error).__name__}: {str(error).splitlines()[0]}"
    }


def test_lasting_and_of_the_moment_together_leave_nothing(machine):
    assert fastest("op 1", timed([], a=OF_THE_MOMENT[0], b=LASTING[0], c=1.0)) == "c"
    assert on_disk() == {}


@pytest.mark.parametrize("error", [OF_THE_MOMENT[0], LASTING[0]], ids=str)
def test_the_first_is_taken_where_all_fail(machine, error):
    assert fastest("op 1", timed([], a=error, b=error)) == "a"
    assert on_disk() == {}


def test_timings_that_vary_are_not_kept(machine):
    """Of whichever candidate: others were at work on the device."""
    assert fastest("op 1", timed([], a=Timing(1.0, True), b=Timing(2.0, False))) == "a"
    assert on_disk() == {}


def test_timings_on_weights_that_did_not_rotate_are_not_kept(machine, monkeypatch):
    monkeypatch.setattr(_tune, "rotating", too_few)
    assert fastest("op 1", timed([], a=2.0, b=1.0)) == "b"
    assert on_disk() == {}


def test_what_was_raised_is_not_held(machine, monkeypatch):
    """Its frames hold tensors."""
    alive: weakref.WeakSet[OutOfResources] = weakref.WeakSet()

    def fails() -> Timing:
        alive.add(error := OutOfResources("no"))
        try:
            raise error
        finally:
            del error

    def succeeds() -> Timing:
        assert not alive
        return Timing(5.0, True)

    assert fastest("op 1", {"a": fails, "b": succeeds}) == "b"


def damaged(machine) -> dict[str, bytes]:
    whole = _choices.file(FACTS).read_bytes()
    entries = json.loads(whole)["choices"]
    (key,) = entries
    changed = [
        {key: e}
        for e in (
            None,
            [],
            "b",
            {},
            {"fastest": 3},
            {"fastest": ["b"]},
            {"fastest": "gone"},
            {"us": {}},
        )
    ]
    changed += [[], None, 3, "b"]
    return {
        **{str(c): json.dumps({"of": FACTS, "choices": c}).encode() for c in changed},
        **{
            str(content): content
            for content in (
                b"",
                b"{",
                b"[1]",
                b"3",
                b"null",
                b"\xff\xfe",
                b'{"op 1": "b"}',
                b"[" * 100000,
            )
        },
        "half": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
    }


def test_a_damaged_or_stale_file_is_measured_over(machine):
    fastest("op 1", timed([], a=3.0, b=1.0))
    for what, content in damaged(machine).items():
        another_process()
        _choices.file(FACTS).write_bytes(content)
        assert fastest("op 1", timed([], a=1.0, b=3.0)) == "a", what
        assert on_disk()["op 1"]["fastest"] == "a", what


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(machine, monkeypatch):
    (machine / "file").write_text("")
    monkeypatch.setenv("FLOWTURBO_CACHE", str(machine / "file"))
    another_process()
    assert fastest("op 1", timed([], a=3.0, b=1.0)) == "b"


def test_a_full_disk_keeps_nothing_half_written(machine, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_cache.os, "replace", full)
    _cache.write_atomically(machine / "entry", b"bytes")
    assert not [path for path in machine.iterdir() if "entry" in path.name or path.suffix == ".tmp"]


def test_processes_that_write_at_once_lose_nothing(machine):
    def process(number: int) -> None:
        for i in range(20):
            _choices.add(FACTS, f"{number} {i}", {"fastest": "a", "us": {}, "cannot": {}}, ["a"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(process, range(4)))
    assert len(_choices.read(FACTS)) == 80
    assert [p for p in machine.iterdir() if p.suffix not in (".json", ".lock")] == []


@pytest.mark.parametrize("missing", ["fcntl", "locks"])
def test_where_there_are_no_locks_it_is_written_all_the_same(machine, monkeypatch, missing):
    if missing == "fcntl":
        monkeypatch.setattr(_choices, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError("no locks available")

        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    assert fastest("op 1", timed([], a=3.0, b=1.0)) == "b"
    assert on_disk()["op 1"]["fastest"] == "b"


def entry_of_another_process(question: str, candidates, choice: str) -> None:
    key = _tune._disk_key(Candidates((question,), candidates, GPU))
    _choices.add(FACTS, key, {"fastest": choice, "us": {}, "cannot": {}}, candidates)


def test_what_others_measured_meanwhile_is_seen(machine):
    log: list[str] = []
    fastest("op 1", timed(log, a=3.0, b=1.0))
    entry_of_another_process("op 2", timed([], a=0.0, b=0.0), "a")
    entry_of_another_process("op 3", timed([], a=0.0, b=0.0), "a")
    log.clear()
    assert fastest("op 2", timed(log, a=3.0, b=1.0)) == "a"  # looked at before measuring
    assert log == []
    assert fastest("op 4", timed(log, a=3.0, b=1.0)) == "b"
    assert fastest("op 3", timed(log, a=3.0, b=1.0)) == "a"  # seen when it was written
    assert log == ["a", "b"]
    assert on_disk().keys() == {"op 1", "op 2", "op 3", "op 4"}


def test_all_go_by_the_process_that_was_first(machine):
    def slow() -> Timing:
        entry_of_another_process("op 1", timed([], a=0.0, b=0.0), "a")
        return Timing(3.0, True)

    assert fastest("op 1", {"a": slow, **timed([], b=1.0)}) == "a"
    assert on_disk()["op 1"]["fastest"] == "a"
