"""The choice by measurement: with a clock and a device of the test's own."""

from __future__ import annotations

import errno
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from flowturbo_kernels import BackendError, _cache, _choices, _measure, _op, _tune, linear
from flowturbo_kernels._measure import Timing
from flowturbo_kernels._tune import Candidates, form

GPU = torch.device("cuda", 0)
FACTS = {"device": "GPU / 1", "torch": torch.__version__, "triton": "3", "clock_rate": 1980000}


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


@contextmanager
def all_of_them(cold, device):
    yield [cold], True


@contextmanager
def too_few(cold, device):
    yield [cold], False


def another_process() -> None:
    _tune._in_memory.clear()
    _tune._on_disk.clear()


def timed(log: list[str], **times: float | Exception | Timing):
    def candidate(name: str, says: float | Exception | Timing):
        def run() -> Timing:
            log.append(name)
            if isinstance(says, Exception):
                raise says
            return says if isinstance(says, Timing) else Timing(says, True)

        return run

    return {name: candidate(name, says) for name, says in times.items()}


def fastest(question: str, candidates) -> str:
    return _tune.fastest(Candidates((question,), candidates, GPU))


def on_disk() -> dict[str, _choices.Entry]:
    """By question alone."""
    return {key.split(" |")[0]: entry for key, entry in _choices.read(FACTS).items()}


def test_the_fastest_is_measured_once_and_remembered_on_disk(machine):
    log: list[str] = []
    assert fastest("op 1", timed(log, a=3.0, b=1e-6, c=2.0)) == "b"
    assert fastest("op 1", timed(log, a=3.0, b=1.0, c=2.0)) == "b"
    assert log == ["a", "b", "c"]
    another_process()
    assert fastest("op 1", timed(log, a=0.1, b=9.0, c=2.0)) == "b"
    assert log == ["a", "b", "c"]
    (file,) = machine.glob("*.json")
    assert "GPU---1" in file.name
    assert torch.__version__ in file.name
    assert on_disk() == {
        "op 1": {"fastest": "b", "us": {"a": 3e6, "b": 1.0, "c": 2e6}, "cannot": {}}
    }
    assert json.loads(file.read_text())["of"] == FACTS


def test_another_shape_is_measured_anew(machine):
    assert fastest("op 1", timed([], a=1.0, b=2.0)) == "a"
    assert fastest("op 2", timed([], a=3.0, b=2.0)) == "b"


def test_other_candidates_are_another_question(machine):
    """auto, then triton, then auto: torch's product is not forgotten."""
    for _ in range(2):
        for _ in range(2):
            assert fastest("op 1", timed([], torch=1.0, tile=2.0, other=3.0)) == "torch"
            assert fastest("op 1", timed([], tile=2.0, other=3.0)) == "tile"
            assert fastest("op 1", timed([], tile=2.0, torch=1.0, another=3.0)) == "torch"
            assert fastest("op 1", timed([], tile=2.0, another=3.0, more=4.0)) == "tile"
        another_process()


def test_settings_of_torch_are_part_of_the_question(machine):
    assert fastest("op 1", timed([], a=1.0, b=2.0)) == "a"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
        assert fastest("op 1", timed([], a=3.0, b=2.0)) == "b"
    finally:
        torch.set_float32_matmul_precision(before)
    assert fastest("op 1", timed([], a=3.0, b=2.0)) == "a"


def test_every_setting_is_read_from_this_torch():
    assert len(_tune._settings()) == len(_tune._SETTINGS)


@pytest.mark.parametrize("fact", FACTS)
def test_what_was_measured_elsewhere_is_not_taken(machine, monkeypatch, fact):
    fastest("op 1", timed([], a=1.0, b=2.0))
    another_process()
    monkeypatch.setattr(_choices, "facts", lambda device: FACTS | {fact: "another"})
    assert fastest("op 1", timed([], a=3.0, b=2.0)) == "b"
    another_process()
    monkeypatch.setattr(_choices, "facts", lambda device: FACTS)
    assert fastest("op 1", timed([], a=3.0, b=2.0)) == "a"


def test_a_file_of_other_facts_under_this_name_is_not_read(machine):
    fastest("op 1", timed([], a=1.0, b=2.0))
    other = FACTS | {"clock_rate": 1755000}
    _choices.file(FACTS).rename(_choices.file(other))
    assert _choices.read(other) == {}


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "é" * 300, "../..\\a:b\0c*?"])
def test_any_device_has_a_legal_file_name(machine, device):
    name = _choices.file(FACTS | {"device": device}).name
    assert len(name.encode()) <= 255
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-")


def test_a_changed_kernel_is_measured_anew(monkeypatch, tmp_path):
    here = _choices._versions()
    assert {"torch", "cuda", "triton", "cublas", "cudnn", "kernels"} == here.keys()
    monkeypatch.setattr(_choices, "__file__", str(tmp_path / "_choices.py"))
    digests = [here["kernels"]]
    for text in ("a", "b"):
        (tmp_path / "linear.py").write_text(text)
        digests.append(_choices._versions()["kernels"])
    assert len(set(digests)) == 3


def test_nothing_is_measured_in_a_capture(machine, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("op 1", timed(log, a=3.0, b=1.0)) == "a"
    assert log == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest("op 1", timed(log, a=3.0, b=1.0)) == "b"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("op 1", timed([], a=3.0, b=1.0)) == "b"
    another_process()
    assert fastest("op 1", timed([], a=3.0, b=1.0)) == "b"


def test_nothing_is_measured_on_the_cpu(machine):
    log: list[str] = []
    candidates = Candidates(("op 1",), timed(log, a=3.0, b=1.0), torch.device("cpu"))
    assert (_tune.fastest(candidates), candidates.known_fastest()) == ("a", None)
    assert log == []


# What is kept


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


# The file, and who else writes it


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


def test_threads_that_ask_together_measure_once(machine):
    log: list[str] = []
    start = threading.Barrier(8)

    def ask(_: int) -> str:
        start.wait()
        return fastest("op 1", timed(log, a=3.0, b=1.0))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"b"}
    assert log == ["a", "b"]


# What was chosen


def test_what_was_chosen_is_said_and_nothing_measured_for_it(machine):
    log: list[str] = []
    candidates = Candidates(("op 1",), timed(log, a=3.0, b=1.0), GPU)
    assert candidates.known_fastest() is None
    assert log == []
    _tune.fastest(candidates)
    assert candidates.known_fastest() == "b"
    another_process()
    assert candidates.known_fastest() == "b"


def test_why_names_the_one_that_runs(machine, monkeypatch):
    x, weight, bias = torch.zeros(4, 64), torch.zeros(64, 64), torch.zeros(64)
    chosen = ["torch", None]
    monkeypatch.setattr(_op, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(Candidates, "known_fastest", lambda self: chosen.pop(0))
    with _op.use_backend("triton"):
        assert linear.why(x, weight, bias) == ("torch", {})
        assert linear.why(x, weight, bias) == ("triton", {})


# What a key holds of a tensor


def test_form_tells_what_kernels_go_by():
    memory = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    x = memory[0]
    others = [
        x.float(),
        x[:32],
        x.t(),
        memory[:, 0, :48],
        x[:, ::2],
        torch.zeros(64, 65)[:, 1:],
        memory.flatten()[1 : 1 + 64 * 64].view(64, 64),
    ]
    forms = [form(t) for t in (x, *others)]
    assert len(set(forms)) == len(forms)
    assert form(memory[1]) == form(x)


def test_form_is_the_same_where_only_strides_of_one_kind_differ():
    """A plan's gates lie as far apart as it has layers and steps; kernels do not care."""
    assert form(torch.zeros(2, 640)[:, :64]) == form(torch.zeros(2, 320)[:, :64])
    assert form(torch.zeros(2, 641)[:, :64]) != form(torch.zeros(2, 640)[:, :64])
    assert form(torch.zeros(1, 640)[:, :64]) == form(torch.zeros(1, 64))


# Timing


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
