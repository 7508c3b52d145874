"""Captures on the stand-in for a CUDA device: real torch's pools, streams and states of capture,
with no arithmetic.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import CONFIG, random_sit
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key
from flowturbo.runtime.recorder import CudaRecorder
from flowturbo_kernels import _streams
from flowturbo_kernels.graphs import GraphPool

fake_cuda = pytest.importorskip("fake_cuda")
if not getattr(fake_cuda, "PRESENT", False):
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

MIB = 1 << 20
WORKSPACE = 4 * MIB
"""No workspace of cuBLAS that torch asks for is smaller, on any device."""


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Whatever is captured here is meant to succeed, unless a test says otherwise; and memory is
    measured from a clean start.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert gc.isenabled()


def model_on_cuda(limit: int = 8) -> ft.FlowModel:
    model = ft.load(
        random_sit(CONFIG, 0), random_sit(CONFIG.refiner(), 1), device="cuda", dtype=torch.bfloat16
    )
    model.captures.limit = limit
    return model


def sampled(model: ft.FlowModel, plan: str = "H1P1R1", times: int = 3) -> Tensor:
    for seed in range(times):
        result = ft.sample(model, plan, [1, 2], guidance=1.5, seed=seed)
    return result


def kept(model: ft.FlowModel) -> list[str]:
    return [str(capture.key.what.plan) for capture in model.captures.report()]


def in_pools() -> int:
    return sum(
        s["total_size"]
        for s in torch.cuda.memory_snapshot()
        if tuple(s["segment_pool_id"]) != (0, 0)
    )


def product(x: Tensor) -> Tensor:
    return x @ x


def matrix() -> dict[str, Tensor]:
    return {"x": torch.ones(64, 64, device="cuda")}


# Memory comes back, and the same model captures again


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


# Captures that can't be


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
    original = model.predictor.evaluate

    def evaluate(*args: object) -> Tensor:
        if torch.cuda.is_current_stream_capturing() and not decoded:
            decoded.append(original(*args).sum().item())
        return original(*args)

    model.predictor.evaluate = evaluate
    sampled(model, times=1)
    with pytest.warns(UserWarning, match="capturing plan H1P1R1 with guidance to latents failed"):
        sampled(model, times=1)
    fake_cuda.violations()
    assert kept(model) == []
    model.predictor.evaluate = original
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


# Modes of the caller


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


# Several models, several threads


def test_captures_have_a_workspace_each_even_on_one_stream():
    first, second = Captures(), Captures()
    for captures in (first, second):
        captures.recorder = CudaRecorder(torch.device("cuda", 0))
    first.recorder._pool._stream = second.recorder._pool._stream = torch.cuda.Stream()
    memory = [
        captures.precapture(Key("it", 64), product, matrix(), []).memory
        for captures in (first, second)
    ]
    assert memory[0] == memory[1] > WORKSPACE


def test_a_workspace_from_outside_is_not_taken_into_a_capture():
    captures = Captures()
    captures.recorder = CudaRecorder(torch.device("cuda", 0))
    with torch.cuda.stream(captures.recorder._pool.stream):
        product(torch.ones(64, 64, device="cuda"))
    assert captures.precapture(Key("it", 64), product, matrix(), []).memory > WORKSPACE


def test_a_workspace_of_a_capture_is_not_taken_outside_it():
    captures = Captures()
    captures.precapture(Key("it", 64), product, matrix(), [])
    torch.cuda.synchronize()
    before, pools = torch.cuda.memory_reserved(), in_pools()
    with torch.cuda.stream(captures.recorder._pool.stream):
        product(torch.ones(64, 64, device="cuda"))
    assert in_pools() == pools
    assert torch.cuda.memory_reserved() > before + WORKSPACE


def test_two_models_in_two_threads():
    start = threading.Barrier(2)

    def one(plan: str) -> list[str]:
        model = model_on_cuda(limit=1)
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                sampled(model, plan)
                sampled(model, "E1")
            sampled(model, plan)
        return kept(model)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, ["H1P1R1", "E2"])) == [["H1P1R1"], ["E2"]]


def test_threads_share_one_model():
    model = model_on_cuda(limit=2)
    plans = ["H1P1R1", "E2", "E1"]

    def one(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            sampled(model, plans[number % 3], times=4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(12)))
    assert len(kept(model)) == 2


def beside_a_capture(work: Callable[[], object]) -> tuple[Captures, list[object]]:
    """Captures a body that waits inside its capture for what another thread does -> captures, and
    what that came to.
    """
    captures, begun, done = Captures(), threading.Event(), threading.Event()

    def other() -> object:
        begun.wait()
        try:
            return work()
        finally:
            done.set()

    def body(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            begun.set()
            done.wait()
        return product(x)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        try:
            captures.precapture(Key("it", 64), body, matrix(), [])
        finally:
            begun.set()
    return captures, [result.result()]


def test_a_thread_that_allocates_and_computes_during_a_capture():
    alone = Captures().precapture(Key("it", 64), product, matrix(), []).memory

    def work() -> int:
        big = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
        small = product(torch.ones(64, 64, device="cuda")) + torch.empty(16).pin_memory().cuda()[0]
        del big, small
        torch.cuda.empty_cache()
        return in_pools()

    captures, _ = beside_a_capture(work)
    assert captures.report()[0].memory == alone
    captures.run(Key("it", 64), product, matrix(), [])


def test_a_thread_that_makes_streams_during_a_capture():
    """torch hands out 32 streams in turn: none of them may be the one that is captured."""
    launched: list[str] = []

    def work() -> list[bool]:
        streams = [torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(40)]
        x = torch.ones(4, device="cuda")
        fake_cuda.launches()
        states = []
        for stream in streams:
            with torch.cuda.stream(stream):
                states.append(torch.cuda.is_current_stream_capturing())
                torch.sin(x)
        launched.extend(fake_cuda.launches())
        return states

    captures, [states] = beside_a_capture(work)
    assert states == [False] * 80
    assert sum("sin" in name for name in launched) == 80
    assert not any("sin" in name for name in fake_cuda.captured())
    captures.run(Key("it", 64), product, matrix(), [])


def test_pools_alive_have_streams_of_their_own_and_those_gone_leave_theirs():
    device = torch.device("cuda", 0)
    pools = [GraphPool(device) for _ in range(40)]
    streams = {pool.stream.cuda_stream for pool in pools}
    assert len(streams) == 40
    assert not streams & {torch.cuda.Stream().cuda_stream for _ in range(40)}
    del pools
    assert GraphPool(device).stream.cuda_stream in streams


def test_a_stream_that_may_still_be_capturing_is_not_used_again():
    pool = GraphPool(torch.device("cuda", 0))
    stream = pool.stream
    with pytest.raises(RuntimeError):
        pool.record(torch.cuda.synchronize)
    fake_cuda.violations()
    assert pool.stream != stream
    del pool
    assert all(GraphPool(stream.device).stream != stream for _ in range(3))


def test_captures_work_where_no_library_can_be_called_directly(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(_streams.ctypes, "CDLL", refuse)
    monkeypatch.setattr(_streams, "_idle", {})
    _streams._clear_workspaces_of_stream.cache_clear()
    try:
        captures = Captures()
        assert captures.precapture(Key("it", 64), product, matrix(), []).memory > WORKSPACE
        assert not isinstance(captures.recorder._pool.stream, torch.cuda.ExternalStream)
        captures.clear()
        assert in_pools() == 0
    finally:
        _streams._clear_workspaces_of_stream.cache_clear()


def test_a_thread_whose_product_has_its_workspace_and_is_not_launched_yet():
    """The workspace stays the device's memory, whatever is captured meanwhile."""
    fetched, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            fetched.set()
            go_on.wait()

    x = torch.ones(64, 64, device="cuda")
    with ThreadPoolExecutor(1) as threads, fake_cuda.before_products(wait):
        result = threads.submit(lambda: product(torch.ones(64, 64, device="cuda")))
        try:
            fetched.wait()
            # nothing is allocated, lest it get the workspace's address
            GraphPool(torch.device("cuda", 0)).record(lambda: x.add_(1))
        finally:
            go_on.set()
        result.result()
    assert fake_cuda.violations() == []


def test_a_thread_that_gives_up_its_captures_and_collects_garbage_during_a_capture():
    model = model_on_cuda()
    sampled(model)
    cycle: list[object] = [ft.compile(model_on_cuda(), "E1")]
    cycle.append(cycle)
    del cycle

    def work() -> int:
        model.captures.clear()
        return gc.collect()

    captures, _ = beside_a_capture(work)
    captures.run(Key("it", 64), product, matrix(), [])
    assert captures.report()[0].hits == 1
