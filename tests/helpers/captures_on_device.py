"""What the tests of captures on the stand-in share: a strict set-up, a small model, its memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from tiny import CONFIG, random_sit
from torch import Tensor

import flowturbo as ft

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
