"""The benchmarks' own captures on the stand-in for a CUDA device: one stream, other threads,
failures that leave nothing behind.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import harness

MIB = 1 << 20


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    fake_cuda.violations()
    yield
    assert not fake_cuda.violations()


def product() -> Tensor:
    a = torch.ones(512, 512, device="cuda")
    return a @ a


def held() -> int:
    harness.collect()
    return torch.cuda.memory_reserved()


def test_measuring_again_holds_no_more_memory():
    """A stream of its own each time would leave a workspace of cuBLAS on each."""
    harness.seconds(product, "cuda", 1)
    before = held()
    for _ in range(3):
        harness.seconds(product, "cuda", 1)
    assert held() == before


@pytest.mark.parametrize("kind", ["python", "cuda"])
def test_a_capture_that_fails_leaves_nothing_behind(kind):
    """Neither torch's memory in a pool of the capture, nor its stream current, nor the next capture
    in danger.
    """

    def fails(x: Tensor) -> Tensor:
        y = x + 1
        if torch.cuda.is_current_stream_capturing():
            if kind == "python":
                raise ValueError("the body's own")
            torch.cuda.synchronize()
        return y

    x = torch.ones(MIB, device="cuda")
    harness.Replays(torch.neg, [(x,)], "cuda").run()
    stream, before = torch.cuda.current_stream(), held()
    for _ in range(2):
        with pytest.raises(ValueError if kind == "python" else RuntimeError):
            harness.Replays(fails, [(x,)], "cuda")
    assert bool(fake_cuda.violations()) == (kind == "cuda")
    assert torch.cuda.current_stream() == stream
    after = held()
    assert after <= before + 2 * (
        2 * MIB
    )  # a graph that was not ended is kept, and with it a block of torch's smallest
    with torch.cuda.stream(harness.graphs().stream):
        big = torch.empty(64 * MIB, device="cuda", dtype=torch.uint8)
    assert torch.cuda.memory_reserved() > after
    del big
    assert held() == after
    replays = harness.Replays(torch.neg, [(x,)], "cuda")
    replays.run()
    assert fake_cuda.launches()


def test_another_thread_may_allocate_during_a_capture():
    made = []

    def other() -> None:
        made.append(torch.empty(256 * MIB, device="cuda", dtype=torch.uint8))

    def with_another(x: Tensor) -> Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return x + 1

    harness.collect()
    replays = harness.Replays(with_another, [(torch.ones(4, device="cuda"),)], "cuda")
    assert len(made) == replays.calls + 1


def test_a_call_that_reads_little_is_replayed_over_more_than_the_cache():
    x = torch.ones(1, 4, 32, 32, device="cuda", dtype=torch.bfloat16)
    replays = harness.Replays(torch.neg, harness.rotated((x,), 2 * x.nbytes, "cuda"), "cuda")
    assert replays.calls * 2 * x.nbytes >= harness.L2_BYTES
    replays.run()
