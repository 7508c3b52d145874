"""Captures on the stand-in for a CUDA device: memory comes back, and lack of it harms nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from captures_on_device import (
    MIB,
    WORKSPACE,
    in_pools,
    kept,
    matrix,
    model_on_cuda,
    product,
    sampled,
    strict,
)
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key

fake_cuda = pytest.importorskip("fake_cuda")
if not getattr(fake_cuda, "PRESENT", False):
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

__all__ = ["strict"]


def test_capture_clear_capture():
    model = model_on_cuda()
    seen = []
    for _ in range(3):
        sampled(model)
        [capture] = model.captures.report()
        assert capture.memory == in_pools() > WORKSPACE
        model.captures.clear()
        assert in_pools() == 0
        seen.append((capture.hits, capture.memory, torch.cuda.memory_reserved()))
    assert seen == [seen[0]] * 3


def test_clearing_gives_memory_back_though_somebody_holds_the_captures():
    model = model_on_cuda()
    held = ft.compile(model, ["H1P1R1", "E2"], 2)
    assert in_pools() == sum(capture.memory for capture in held)
    model.captures.clear()
    assert in_pools() == 0
    assert ft.compile(model, "E2", 2)[0].memory > WORKSPACE


def test_a_model_captures_again_though_somebody_keeps_a_tensor_of_an_earlier_capture():
    """Then the old pool is there and has ended, and torch takes it for no other capture."""
    captures, inputs, kept_tensors = Captures(), matrix(), []

    def body(x: Tensor) -> Tensor:
        kept_tensors.append(x + 1)
        return product(x)

    for _ in range(2):
        captures.precapture(Key("it", 64), body, inputs, [])
        captures.clear()
    assert in_pools() > 0
    kept_tensors.clear()
    torch.cuda.empty_cache()
    assert in_pools() == 0


def test_plans_share_the_memory_of_their_pool():
    model = model_on_cuda()
    first, second = ft.compile(model, ["H1P1R1", "E2"], 2)
    assert second.memory < first.memory / 4
    assert first.memory + second.memory == in_pools()


def test_eviction_at_limit_1():
    model = model_on_cuda(limit=1)
    for plan in ("H1P1R1", "E2") * 3:
        sampled(model, plan)
        assert kept(model) == [plan]
    assert in_pools() == model.captures.report()[0].memory


def test_weights_that_moved_are_captured_anew():
    model = model_on_cuda()
    for _ in range(3):
        sampled(model)
        sampled(model, "E2")
        assert kept(model) == ["H1P1R1", "E2"]
        model.predictor.to("cpu").to("cuda")


# Lack of memory


def hungry(x: Tensor) -> Tensor:
    """Takes 16 MiB, and 64 more where it is captured."""
    parts = [torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")]
    if torch.cuda.is_current_stream_capturing():
        parts += [torch.empty(16 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
    return x + len(parts)


@pytest.fixture
def memory() -> Iterator[Callable[[int], None]]:
    """Leaves so many MiB of the device beyond what is held now."""

    def leave(mib: int) -> None:
        fake_cuda.set_memory(mib + torch.cuda.memory_reserved() // MIB + 1)

    yield leave
    fake_cuda.set_memory(None)


def test_a_capture_that_lacks_memory_gives_back_what_it_had(memory):
    captures, inputs = Captures(), {"x": torch.zeros(8, device="cuda")}
    before = torch.cuda.memory_reserved()
    memory(60)
    with pytest.raises(ft.CaptureError, match="capturing it for 8 images ran out of memory"):
        captures.precapture(Key("it", 8), hungry, inputs, [])
    assert (in_pools(), torch.cuda.memory_reserved()) == (0, before)
    captures.precapture(Key("small", 8), lambda x: x + 1, inputs, [])
    torch.randn(3, device="cuda")
    memory(200)
    made = captures.precapture(Key("it", 8), hungry, inputs, [])
    assert 80 * MIB <= made.memory < 100 * MIB


def test_captures_make_room_for_one_that_lacks_memory(memory):
    captures, inputs = Captures(), {"x": torch.zeros(8, device="cuda")}
    memory(150)
    first = captures.precapture(Key("first", 8), hungry, inputs, [])
    other = captures.precapture(
        Key("other", 8), hungry, inputs, []
    )  # within the first one's memory
    assert captures.report() == [first, other]
    ballast = torch.empty(50 * MIB, dtype=torch.uint8, device="cuda")
    captures.recorder._pool._stream = None  # on another stream nothing is shared
    made = captures.precapture(Key("it", 8), hungry, inputs, [])
    assert captures.report() == [made]
    assert in_pools() == made.memory
    del ballast
