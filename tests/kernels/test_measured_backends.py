"""Several backends that can take the same arguments: the fastest is measured, on a machine of the
test's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_machine import GPU, another_process, on_disk

from flowturbo_kernels import BackendError, _op, use_backend
from flowturbo_kernels._measure import Timing
from flowturbo_kernels._tune import Candidates


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape).as_subclass(OnGpu)


X = on_gpu(4, 8)


def _measured(x: torch.Tensor, factor: float = 1.0, count: int = 1) -> torch.Tensor:
    return x * factor * count


OP: _op.Op[Any, Any] = _op.Op(
    _measured,
    lambda *args, **options: None,
    lambda make: (),
    "(Tensor x, float factor, int count) -> Tensor",
    None,
    torch.contiguous_format,
)


class Backends:
    """Backends of OP that take the times they are given, or fail; what they were asked."""

    def __init__(self, **times: float | Exception) -> None:
        self.ran: list[str] = []
        self.asked: list[str] = []
        self.refusals: dict[str, str] = {}
        for name, says in times.items():
            OP.backend(name, self.unsupported(name))(self.run(name, says))

    def unsupported(self, name: str) -> Any:
        def why(*args: Any) -> str | None:
            self.asked.append(name)
            return self.refusals.get(name)

        return why

    def run(self, name: str, says: float | Exception) -> Any:
        def timed(*args: Any) -> Timing:
            self.ran.append(name)
            if isinstance(says, Exception):
                raise says
            return Timing(says, True)

        return timed


@pytest.fixture(autouse=True)
def gpu(machine, monkeypatch):
    monkeypatch.setattr(_op, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(OP, "backends", {})


def test_the_fastest_backend_is_measured_once_and_said():
    backends = Backends(triton=2.0, cuda=1.0)
    assert OP.why(X) == ("triton", {"cuda": "not measured yet at these sizes"})
    assert OP(X).seconds == 1.0
    assert backends.ran == ["triton", "cuda", "cuda"]
    assert OP.why(X) == ("cuda", {"triton": "not the fastest when measured"})
    assert OP(X).seconds == 1.0
    assert backends.ran[3:] == ["cuda"]
    [entry] = on_disk().values()
    assert entry["fastest"] == "cuda"
    another_process()
    assert OP(X).seconds == 1.0
    assert backends.ran[4:] == ["cuda"]


def test_backends_are_not_asked_again_once_the_fastest_is_known():
    backends = Backends(triton=1.0, cuda=2.0)
    OP(X)
    OP(X)
    backends.asked.clear()
    OP(X)
    assert backends.asked == []
    another_process()
    OP(X)
    assert backends.asked == ["triton", "cuda"]


def test_what_a_kernel_may_be_specialised_on_is_measured_anew():
    backends = Backends(triton=1.0, cuda=2.0)
    same = (X, 0.5, 1), (X, 2.0, 1), (on_gpu(4, 8), -1.0, 1)
    others = (X, 0.5, 2), (on_gpu(8, 4), 0.5, 1), (on_gpu(33)[1:].view(4, 8), 0.5, 1)
    for args in (*same, *others):
        OP(*args)
    assert backends.ran.count("cuda") == 1 + len(others)


def test_nothing_is_measured_in_a_capture_and_the_first_backend_runs(monkeypatch):
    backends = Backends(triton=2.0, cuda=1.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    OP(X)
    OP(X)
    assert backends.ran == ["triton", "triton"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    OP(X)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    OP(X)
    assert backends.ran[2:] == ["triton", "cuda", "cuda", "cuda"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_asked_for_by_name_is_not_measured(name):
    backends = Backends(triton=2.0, cuda=1.0)
    for other in ("auto", name):
        with use_backend(other):
            OP(X)
            why = OP.why(X)
    assert backends.ran == ["triton", "cuda", "cuda", name]
    assert why == (name, {})
    backends.refusals[name] = "it is Sunday"
    with use_backend(name), pytest.raises(BackendError, match="but: it is Sunday"):
        OP(X)


def test_a_backend_that_refuses_or_fails_leaves_the_others_to_run():
    backends = Backends(triton=NotImplementedError("no such GPU"), cuda=1.0)
    assert OP(X).seconds == 1.0
    assert OP.why(X)[0] == "cuda"
    another = Backends(triton=1.0, cuda=2.0)
    another.refusals["triton"] = "it is Sunday"
    assert OP(on_gpu(3)).seconds == 2.0
    assert another.ran == ["cuda"]
    assert OP.why(on_gpu(3)) == ("cuda", {"triton": "it is Sunday"})
    assert backends.ran == ["triton", "cuda", "cuda"]


def tiles(*args: Any) -> Candidates:
    cold = (on_gpu(2),)
    functions = {
        "triton (64, 4)": lambda weight: Timing(3.0, True),
        "triton (32, 2)": lambda weight: Timing(1.0, True),
        "torch": lambda weight: Timing(4.0, True),
    }
    return Candidates(("tiles",), functions, GPU, cold)


def test_a_backends_own_candidates_join_the_choice():
    Backends(cuda=2.0, triton=9.0)
    OP.backends["triton"] = OP.backends["triton"]._replace(candidates=tiles)
    for _ in range(2):
        assert OP(X).seconds == 1.0
        assert OP.why(X) == ("triton (32, 2)", {"cuda": "not the fastest when measured"})
    [entry] = on_disk().values()
    assert entry["us"].keys() == {"cuda", "triton (64, 4)", "triton (32, 2)", "torch"}


def test_settings_matter_where_torchs_is_a_candidate():
    """It is not asked by the question alone."""
    backends = Backends(cuda=2.0, triton=9.0)
    OP.backends["triton"] = OP.backends["triton"]._replace(candidates=tiles)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            OP(X)
    finally:
        torch.set_float32_matmul_precision(before)
    assert backends.ran == ["cuda", "cuda"]
