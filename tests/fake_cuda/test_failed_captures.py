"""Captures that fail on the stand-in for a CUDA device, and what they leave whole."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from captures_on_device import MIB, in_pools, kept, matrix, model_on_cuda, product, sampled, strict
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key

fake_cuda = pytest.importorskip("fake_cuda")
if not getattr(fake_cuda, "PRESENT", False):
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

__all__ = ["strict"]


def item(x: Tensor) -> Tensor:
    return x + x.sum().item()


def waits(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x + 1


def elsewhere(x: Tensor) -> Tensor:
    with torch.cuda.stream(torch.cuda.Stream()):
        return x + torch.ones(4 * MIB, device="cuda")[0]


def to_the_host(x: Tensor) -> Tensor:
    return x.cpu().cuda()


def wrong(x: Tensor) -> Tensor:
    raise ValueError("mine")


def swallowed(x: Tensor) -> Tensor:
    try:
        return item(x)
    except RuntimeError:
        return x + 1


FORBIDDEN = {
    item: "AcceleratorError",
    waits: "AcceleratorError",
    elsewhere: "",
    to_the_host: "",
    wrong: "ValueError: mine",
    swallowed: "",
}


@pytest.mark.parametrize(
    "forbidden, said", FORBIDDEN.items(), ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("beside_another", [False, True])
def test_a_body_that_can_not_be_captured_harms_nothing(forbidden, said, beside_another):
    captures, inputs = Captures(), matrix()
    others = (
        [captures.precapture(Key("another", 64), product, inputs, [])] if beside_another else []
    )
    causes: list[str] = []

    def body(x: Tensor) -> Tensor:
        y = product(x) + torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")[0]
        if not torch.cuda.is_current_stream_capturing():
            return y
        try:
            return forbidden(y)
        except Exception as error:
            causes.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            raise

    numbers = torch.cuda.get_rng_state()
    captures.run(Key("it", 64), body, inputs, [])
    with pytest.warns(
        UserWarning, match=f"capturing it failed .*{said}.*; it runs without a graph"
    ) as warned:
        captures.run(Key("it", 64), body, inputs, [])
    assert all(cause in str(warned[0].message) for cause in causes)
    assert causes or forbidden is swallowed
    fake_cuda.violations()  # these were meant
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_rng_state().equal(numbers)
    torch.randn(3, device="cuda")
    torch.empty(3).pin_memory()
    captures.run(Key("it", 64), body, inputs, [])  # as it is
    if not others:
        assert in_pools() == 0
    made = [captures.precapture(Key(what, 64), product, inputs, []) for what in range(3)]
    captures.run(Key(0, 64), product, inputs, [])
    assert captures.report() == [*others, *made[1:], made[0]]
    captures.clear()
    assert in_pools() == 0
    captures.precapture(Key("it", 64), product, inputs, [])


def test_a_model_samples_and_captures_after_a_capture_that_failed():
    model = model_on_cuda()
    decoded = []
    original = model.predictor.evaluate_and_move

    def evaluate(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        if torch.cuda.is_current_stream_capturing() and not decoded:
            decoded.append(original(*args, **options)[0].sum().item())
        return original(*args, **options)

    model.predictor.evaluate_and_move = evaluate
    sampled(model, times=1)
    with pytest.warns(UserWarning, match="capturing plan H1P1R1 with guidance to latents failed"):
        sampled(model, times=1)
    fake_cuda.violations()
    assert kept(model) == []
    model.predictor.evaluate_and_move = original
    sampled(model)
    sampled(model, "E2")
    assert kept(model) == ["E2"]
    ft.compile(model, "H1P1R1", 2)
    assert kept(model) == ["E2", "H1P1R1"]


def test_pools_from_before_and_after_a_failure_are_told_apart():
    """A graph alive in the old one does not make the new one last."""
    captures, inputs, kept_tensors = Captures(limit=2), matrix(), []

    def keeping(x: Tensor) -> Tensor:
        kept_tensors.append(x + 1)
        return product(x)

    def twice(what: str, body: Callable[[Tensor], Tensor]) -> None:
        for _ in range(2):
            captures.run(Key(what, 64), body, inputs, [])

    twice("old", product)
    with pytest.warns(UserWarning, match="capturing it failed"):
        twice("it", lambda x: waits(x) if torch.cuda.is_current_stream_capturing() else x)
    fake_cuda.violations()
    twice("new", keeping)
    twice("old", product)
    twice("newer", product)
    assert [capture.key.what for capture in captures.report()] == ["old", "newer"]


def test_the_stream_of_the_caller_stays_the_current_one():
    captures, inputs, stream = Captures(), matrix(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        captures.precapture(Key("it", 64), product, inputs, [])
        assert torch.cuda.current_stream() == stream
        with pytest.raises(ft.CaptureError):
            captures.precapture(
                Key("other", 64),
                lambda x: waits(x) if torch.cuda.is_current_stream_capturing() else x,
                inputs,
                [],
            )
        assert torch.cuda.current_stream() == stream
        captures.run(Key("it", 64), product, inputs, [])
    fake_cuda.violations()


def test_no_garbage_is_collected_inside_a_capture():
    captures = Captures()

    def body(x: Tensor) -> Tensor:
        assert gc.isenabled() == (not torch.cuda.is_current_stream_capturing())
        return x + 1

    captures.precapture(Key("it", 64), body, matrix(), [])
