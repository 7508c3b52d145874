"""Walks over the registry of operations, shared by the tests of references and of kernels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from close import assert_close, relative_error
from torch import Tensor

from flowturbo_kernels import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


def mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return (
        type(value)(mapped(v, change) for v in value) if isinstance(value, list | tuple) else value
    )


def examples(name: str, dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    yield from OPS[name].example(
        lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    )


FP8 = tuple(name for name in OPS if re.search("fp8|quantize", name))
"""Operations that take and give fp8, whose errors are of its own size:
tests/kernels/test_fp8.py.
"""
ENDS = "unscale_latents", "image_bytes"
"""Operations whose results have a dtype of their own: tests/kernels/test_image_ends.py."""
NAMES = [name for name in OPS if name not in FP8 + ENDS]
CASES = [(name, i) for name in NAMES for i, _ in enumerate(examples(name, torch.float32))]


def case(name: str, index: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    return list(examples(name, dtype, seed))[index]


def poison_new_memory(monkeypatch: Any) -> None:
    """Whatever memory a kernel is given holds NaN, not by chance the right result of an earlier
    call.
    """
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poison(*args: Any, allocate: Any = allocate, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() and t.device.type != "meta" else t

        monkeypatch.setattr(torch, name, poison)


def strided(t: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor in every axis, the rest poisoned."""
    larger = torch.full([2 * s for s in t.shape], math.nan, dtype=t.dtype, device=t.device)
    view = larger[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def assert_errs_as_torch(
    results: list[Tensor],
    reference: Callable[..., Any],
    args: Any,
    floor: float,
    any_shape: bool = False,
) -> None:
    """Results err at most twice as much as torch's own operations do, and `floor`.

    any_shape: and by a few roundings of the inputs. Results of a few numbers may hang on their last
    bits (two nearly equal ones, normalised), and torch be right by chance.
    """
    truths, plain = tensors(reference(*mapped(args, Tensor.double))), tensors(reference(*args))
    others = [tensors(reference(*mapped(args, _shaken))) for _ in range(8 if any_shape else 0)]
    for i, (got, torchs, truth) in enumerate(zip(results, plain, truths, strict=True)):
        assert got.dtype == torchs.dtype
        hanging = max((relative_error(other[i], truth) for other in others), default=0.0)
        assert_close(got, truth, 2 * relative_error(torchs, truth) + floor + 6 * hanging)


def _shaken(t: Tensor) -> Tensor:
    """In float64, each value changed by up to its float32 rounding."""
    change = (2 * torch.rand(t.shape) - 1).to(t.device).double() * torch.finfo(torch.float32).eps
    return t.double() * (1 + change)
