"""Captures on the stand-in for a CUDA device under the caller's modes."""

from __future__ import annotations

import pytest
import torch
from captures_on_device import kept, matrix, model_on_cuda, sampled, strict

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key

fake_cuda = pytest.importorskip("fake_cuda")
if not getattr(fake_cuda, "PRESENT", False):
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

__all__ = ["strict"]


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_and_then_not(first):
    model = model_on_cuda()
    for mode in (first, first, not first, first, not first):
        with torch.inference_mode(mode):
            assert sampled(model, times=1).is_inference() == mode
    assert model.captures.report()[0].hits == 4


def test_weights_of_inference_mode_are_captured():
    with torch.inference_mode():
        model = model_on_cuda()
        sampled(model)
    sampled(model)
    assert model.captures.report()[0].hits == 5


def test_a_profiler_may_be_on():
    model = model_on_cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        sampled(model)
    sampled(model)
    assert kept(model) == ["H1P1R1"]


def test_random_numbers_may_be_drawn_inside_and_after():
    captures, inputs = Captures(), matrix()
    for _ in range(3):
        captures.run(Key("it", 64), lambda x: x + torch.randn_like(x), inputs, [])
        torch.randn(3, device="cuda")
    assert captures.report()[0].hits == 2


def test_pinned_memory_may_be_taken_inside():
    captures = Captures()
    captures.precapture(
        Key("it", 64),
        lambda x: x + torch.ones(64).pin_memory().cuda(non_blocking=True),
        matrix(),
        [],
    )
    captures.clear()
    torch.ones(64).pin_memory()


def test_what_can_not_be_captured_is_said_though_other_plans_were():
    model = model_on_cuda()
    ft.compile(model, "E1", 2)
    with (
        torch.autocast("cuda"),
        pytest.raises(ft.CaptureError, match=r"plan E2 .* can't be captured: .*under autocast"),
    ):
        ft.compile(model, "E2", 2)
    model.captures.limit = 0
    with pytest.raises(ft.CaptureError, match="limit = 0"):
        ft.compile(model, "E2", 2)


def test_nothing_is_captured_or_replayed_inside_the_callers_own_capture():
    model = model_on_cuda()
    sampled(model)
    own, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(own, stream=stream):
        assert not model.captures.possible(model.device)
        torch.zeros(3, device="cuda").add_(1)
    assert model.captures.possible(model.device)
