"""The kernels' measured choice, on a machine of the test's own."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_machine import FACTS, GPU, another_process, fastest, on_disk, timed

from flowturbo_kernels import _choices, _op, _tune, linear
from flowturbo_kernels._tune import Candidates, form


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
    libraries = {"cublas", "cudnn", "quack", "flash_attn", "cutlass"}
    assert {"torch", "cuda", "triton", "kernels"} | libraries == here.keys()
    monkeypatch.setattr(_choices, "_folder", lambda: tmp_path)
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


def test_threads_that_ask_together_measure_once(machine):
    log: list[str] = []
    start = threading.Barrier(8)

    def ask(_: int) -> str:
        start.wait()
        return fastest("op 1", timed(log, a=3.0, b=1.0))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"b"}
    assert log == ["a", "b"]


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
    choices = ["torch", None]
    monkeypatch.setattr(_op, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(Candidates, "known_fastest", lambda self: choices.pop(0))
    with _op.use_backend("triton"):
        assert linear.why(x, weight, bias) == ("torch", {})
        assert linear.why(x, weight, bias) == ("triton", {})


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
