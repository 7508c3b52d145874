"""Captures that fail, lack memory, or are asked for by several threads."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_recorder import LABELS, Fake, captured_model, plain
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key


def test_a_capture_that_fails_is_said_once_and_the_run_goes_on():
    model, recorder = captured_model()
    ft.sample(model, "H1", LABELS, seed=0)
    recorder.failures = [RuntimeError("operation not permitted\nwhen capturing")]
    with pytest.warns(
        UserWarning,
        match=(
            r"capturing plan H1 .* failed \(RuntimeError: operation not permitted\); it runs "
            r"without"
        ),
    ):
        result = ft.sample(model, "H1", LABELS, seed=0)
    assert result.equal(plain("H1", LABELS, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ft.sample(model, "H1", LABELS, seed=0).equal(result)
    assert recorder.recorded == 0
    assert ft.compile(model, "H1", 3, guided=False)  # asked by name it is tried again
    ft.sample(model, "H1", LABELS, seed=0)
    assert model.captures.report()[0].hits == 1


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd much more")


def test_out_of_memory_gives_up_other_captures_and_tries_again():
    model, recorder = captured_model()
    ft.compile(model, ["E1", "E2"])
    recorder.failures = [OOM]
    [capture] = ft.compile(model, "E3")
    assert model.captures.report() == [capture]


def test_out_of_memory_for_good_leaves_the_model_usable_and_says_what_was_asked_for():
    model, recorder = captured_model()
    said = "capturing plan H8 with guidance to latents for 64 images ran out of memory .*20.00 GiB"
    recorder.failures = [OOM, OOM]
    with pytest.raises(ft.CaptureError, match=said):
        ft.compile(model, "H8", 64)
    assert model.captures.report() == []
    assert recorder.released
    for _ in range(3):
        assert ft.sample(model, "H1", LABELS, seed=0).equal(plain("H1", LABELS, seed=0))
    ft.sample(model, "E1", LABELS, seed=0)
    recorder.failures = [OOM, OOM]
    with pytest.warns(UserWarning, match="ran out of memory"):
        assert ft.sample(model, "E1", LABELS, seed=0).equal(plain("E1", LABELS, seed=0))


@pytest.mark.parametrize(
    "said", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"]
)
def test_libraries_lack_memory_too(said):
    model, recorder = captured_model()
    ft.compile(model, ["E1", "E2"])
    recorder.failures = [RuntimeError(said)]
    [capture] = ft.compile(model, "E3")
    assert model.captures.report() == [capture]


def test_a_first_run_that_lacks_memory_makes_compile_fail_as_it_says():
    model, _ = captured_model()
    original = model.predictor.evaluate

    def evaluate(*args: object) -> Tensor:
        raise OOM

    model.predictor.evaluate = evaluate
    with pytest.raises(
        ft.CaptureError,
        match="capturing plan H8 with guidance to latents for 64 images ran out of memory",
    ):
        ft.compile(model, "H8", 64)
    model.predictor.evaluate = original
    assert ft.sample(model, "H1", LABELS, seed=0).equal(plain("H1", LABELS, seed=0))


def test_what_a_failed_body_had_made_is_let_go_before_memory_is_given_back():
    captures, recorder = Captures(recorder=Fake()), Fake()
    captures.recorder = recorder
    partials, seen = [], []

    def deeper(x: Tensor) -> Tensor:
        partial = x + 1
        partials.append(weakref.ref(partial))
        raise OOM.with_traceback(None)

    def body(x: Tensor) -> Tensor:
        partial = x + 2
        partials.append(weakref.ref(partial))
        try:
            return deeper(partial)
        except torch.OutOfMemoryError:
            raise torch.OutOfMemoryError("again") from None

    recorder.release = lambda: seen.append([tensor() is None for tensor in partials])
    try:
        raise ValueError("the caller's own")
    except ValueError as error:
        mine = error
        with pytest.raises(ft.CaptureError, match="ran out of memory"):
            captures.precapture(Key("it", 1), body, {"x": torch.zeros(1)}, [])
    assert seen[0] == [True, True]
    assert seen[1] == [True] * 4
    assert mine.__traceback__ is not None


def test_captures_make_room_for_a_run_that_has_none():
    model, _ = captured_model()
    ft.compile(model, "E1", 3)
    failures = [OOM]
    original = model.predictor.evaluate

    def evaluate(*args: object) -> Tensor:
        if failures and len(model.captures.report()):
            raise failures.pop()
        return original(*args)

    model.predictor.evaluate = evaluate
    assert ft.sample(model, "H1", LABELS, seed=0).equal(plain("H1", LABELS, seed=0))
    assert model.captures.report() == []


def test_concurrent_calls_give_the_results_of_sequential_ones():
    model, recorder = captured_model(limit=2)
    plans = ["H1R1", "E2", "H1P1"]
    work = [(plans[n % 3], [n % 10, (n + 3) % 10], 1.0 + n % 2, n) for n in range(36)]
    truth = [
        plain(plan, labels, guidance=guidance, seed=seed) for plan, labels, guidance, seed in work
    ]

    def one(job: tuple[str, list[int], float, int]) -> Tensor:
        plan, labels, guidance, seed = job
        return ft.sample(model, plan, labels, guidance=guidance, seed=seed)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, work))
    assert all(a.equal(b) for a, b in zip(results, truth, strict=True))
    assert recorder.replayed > 6
    assert len(model.captures.report()) == 2


def test_models_record_one_after_another():
    """To wait for the device breaks a recording in any other thread."""
    alone, start = threading.Lock(), threading.Barrier(4)

    class Lonely(Fake):
        def seconds(self, run: Callable[[], object]) -> float:
            assert alone.acquire(blocking=False), "waited for the device beside a recording"
            alone.release()
            return super().seconds(run)

        def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
            assert alone.acquire(blocking=False), "two recordings at once"
            try:
                time.sleep(0.02)  # so that others come by, were they let
                return super().record(run)
            finally:
                alone.release()

    def one(number: int) -> int:
        captures = Captures(recorder=Lonely())
        start.wait()
        for what in range(3):
            captures.precapture(Key(what, 1), lambda x: x + 1, {"x": torch.zeros(1)}, [])
        return len(captures.report())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [3] * 4
