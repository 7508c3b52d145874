"""Every operation at the sizes of published models: each backend against plain torch, eager and
compiled (bench/plain_ops.py), beside the device's limits.

    python -m pytest bench/test_kernels.py --benchmark-json=kernels.json && python bench/table.py
    kernels.json

One benchmark group an operation and size; times are of `calls` calls in one replay. Without a GPU
it runs on the CPU, at batch 1 of a small model, which measures only that it runs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from correctness import RESULTS, result_difference
from harness import Replays, rotated
from machine import STAND_IN, device_name
from operations import DEVICE, DTYPE, groups, shapes
from plain_ops import PLAIN
from report import WRONG
from roofline import ceilings, floor, work

from flowturbo_kernels import OPS, BackendError, use_backend

COMPILED_BATCHES = (8,) if DEVICE == "cuda" else ()
"""torch.compile takes seconds a shape; one size tells."""
ROUNDS = 10
FP8 = [name for name in OPS if re.search("fp8|quantize", name)]


def about(batch: int, index: int, who: str) -> dict[str, str]:
    return {"group": groups(batch)[index], "who": who}


CASES = [group.split()[0] for group in groups(1)]
"""The operations' names, for ids of tests."""

PROVIDERS = ("eager", "compiled", "triton", "cuda", "auto")


def provider(who: str, name: str, batch: int) -> Callable[..., Any]:
    op = OPS[name]
    if who == "eager":
        return PLAIN[name]
    if who == "compiled":
        if batch not in COMPILED_BATCHES:
            pytest.skip("torch.compile is timed at one batch size")
        torch._dynamo.reset()
        return torch.compile(PLAIN[name], mode="max-autotune-no-cudagraphs", fullgraph=True)
    if who not in ("auto", *op.backends):
        pytest.skip(f"there is no {who} backend")

    def run(*args: Any) -> Any:
        with use_backend(who):
            return op(*args)

    return run


@torch.inference_mode()
def test_kernel(benchmark, rounds, batch, index, who):
    name, args = next(itertools.islice(shapes(batch), index, None))
    function = provider(who, name, batch)
    try:
        result = function(*args)
    except BackendError as error:
        pytest.skip(str(error))
    dtype = torch.float8_e4m3fn if name in FP8 else DTYPE
    apart = None if STAND_IN else result_difference(result, OPS[name].reference(*args))
    if apart is not None and not apart <= RESULTS[dtype]:
        pytest.fail(
            f"{WRONG}{apart:.1%} from the reference, expected {RESULTS[dtype]:.1%}", pytrace=False
        )
    needed = work(name, args, result)
    replays = Replays(function, rotated(args, needed.bytes, DEVICE), DEVICE)
    benchmark.group = groups(batch)[index]
    benchmark.extra_info |= {
        "op": name,
        "batch": batch,
        "provider": who,
        "backend": OPS[name].why(*args)[0] if who == "auto" else who,
        "calls": replays.calls,
        "bytes": needed.bytes,
        "flops": needed.flops,
        "apart": {} if apart is None else {"results": apart},
        "floor": floor(needed, DTYPE if name == "attention_quantized" else dtype, DEVICE),
        "ceilings": ceilings(DEVICE),
        "device": device_name(),
        "dtype": str(DTYPE),
        "torch": torch.__version__,
    }
    benchmark.pedantic(replays.run, rounds=rounds, warmup_rounds=2, iterations=1)
