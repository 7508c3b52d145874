"""Every operation at the sizes of published models: each backend against eager torch and torch.compile, beside the device's limits.

    python -m pytest bench/test_kernels.py --benchmark-json=kernels.json && python bench/table.py kernels.json

One benchmark group an operation and size; times are of `calls` calls in one replay. Without a GPU it runs on the CPU, at batch 1 of
a small model, which measures only that it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import L2_BYTES, Replays
from roofline import ceilings, floor, work
from torch import Tensor

from flowturbo_kernels import OPS, BackendError, sizes, use_backend
from flowturbo_kernels._op import tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
COMPILED_BATCHES = (8,) if DEVICE == "cuda" else ()
"""torch.compile takes seconds a shape; one size tells."""


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def shapes(batch: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(operation, arguments) of SiT-XL/2 at 256 x 256 and of the SD decoder on a GPU; of a small model elsewhere."""
    if DEVICE == "cuda":
        yield from sizes.sit(make, batch)
        yield from sizes.sit_fp8(make, batch)
        yield from sizes.vae(make, batch)
    else:
        yield from sizes.sit(make, batch, hidden=96, heads=4, side=8)


def described(name: str, args: tuple[Any, ...]) -> str:
    first = max(tensors(args), key=Tensor.numel) if name != "linear" else args[1]
    return f"{name} {'x'.join(map(str, first.shape))}"


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=DTYPE)


def _count(batch: int) -> int:
    families = (sizes.sit(_meta, 1), sizes.sit_fp8(_meta, 1), sizes.vae(_meta, 1)) if DEVICE == "cuda" else (sizes.sit(_meta, 1),)
    return sum(1 for family in families for _ in family)


CASES = _count(1)
PROVIDERS = ("eager", "compiled", "triton", "cuda", "auto")


def provider(which: str, name: str, batch: int) -> Callable[..., Any]:
    op = OPS[name]
    if which == "eager":
        return op.reference
    if which == "compiled":
        if batch not in COMPILED_BATCHES:
            pytest.skip("torch.compile is timed at one batch size")
        torch._dynamo.reset()
        return torch.compile(op.reference, mode="max-autotune-no-cudagraphs", fullgraph=True)
    if which not in ("auto", *op.backends):
        pytest.skip(f"{name} has no {which} backend")

    def run(*args: Any) -> Any:
        with use_backend(which):
            return op(*args)

    return run


@pytest.mark.parametrize("which", PROVIDERS)
@pytest.mark.parametrize("index", range(CASES))
@torch.inference_mode()
def test_kernel(benchmark, batch, index, which):
    name, args = next(itertools.islice(shapes(batch), index, None))
    function = provider(which, name, batch)
    try:
        result = function(*args)
    except BackendError as error:
        pytest.skip(str(error))
    needed = work(name, args, result)
    copies = 1 if DEVICE == "cpu" else max(1, min(16, -(-L2_BYTES // needed.bytes)))
    arguments = [args, *(next(itertools.islice(shapes(batch), index, None))[1] for _ in range(copies - 1))]
    replays = Replays(function, arguments, DEVICE)
    benchmark.group = f"{described(name, args)} batch {batch}"
    benchmark.extra_info |= {
        "op": name,
        "batch": batch,
        "provider": which,
        "backend": OPS[name].why(*args)[0] if which == "auto" else which,
        "calls": replays.calls,
        "bytes": needed.bytes,
        "flops": needed.flops,
        "floor": floor(needed, torch.float8_e4m3fn if name == "linear_fp8" else DTYPE, DEVICE),
        "ceilings": ceilings(DEVICE),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "dtype": str(DTYPE),
        "torch": torch.__version__,
    }
    benchmark.pedantic(replays.run, rounds=10, warmup_rounds=2, iterations=1)
