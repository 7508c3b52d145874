"""Sampling whole plans, noise to images: this library against its rivals, beside the device's limit.

    python -m pytest bench/test_plans.py --benchmark-json=plans.json && python bench/table.py plans.json

SiT-XL/2 with random weights and SD's decoder, guidance on, in bfloat16; without a GPU a small model, which measures only that it
runs. --plans, --batches, --sizes, --decode and --rivals choose; the whole takes hours, since every rival compiles.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from typing import Any

import pytest
import torch
from rivals import GUIDANCE, RIVALS, NotHere, Sampler, Subject, subject
from roofline import ceilings, decode_floor, plan_floor

import flowturbo as ft
from flowturbo.latency import seconds
from flowturbo.models.vae import DiffusersVAE

ROUNDS = 5


@functools.lru_cache(maxsize=1)
def prepared(rival: str, size: int, batch: int, decode: bool) -> tuple[Subject, Sampler, float]:
    """What is sampled, by whom, and the seconds of setting that up."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    s = subject(size, batch, decode)
    began = time.perf_counter()
    return s, RIVALS[rival](s), time.perf_counter() - began


@functools.lru_cache(maxsize=1)
def decode_seconds(size: int, batch: int, floor: bool) -> float:
    """Of the plain decoder by itself: measured, or the least that it could take."""
    s = subject(size, batch, True)
    shape = (batch, 4, size // 8, size // 8)
    if floor:
        return decode_floor(s.vae, shape, s.dtype, s.device.type)
    vae, latents = DiffusersVAE(s.vae), torch.randn(shape, device=s.device)
    with torch.no_grad():
        vae.decode(latents)
        return statistics.median(seconds(lambda: vae.decode(latents), s.device) for _ in range(3))


def test_plan(benchmark: Any, rival: str, size: int, batch: int, decode: str, plan: str) -> None:
    with_vae = decode == "yes"
    try:
        s, sampler, setup = prepared(rival, size, batch, with_vae)
    except NotHere as reason:
        pytest.skip(str(reason))
    cuda = s.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = setup + seconds(lambda: sampler(plan), s.device)
    result = sampler(plan)
    assert result.shape == ((batch, size, size, 3) if with_vae else (batch, 4, size // 8, size // 8))
    assert with_vae or result.isfinite().all()

    def run() -> None:
        sampler(plan)
        if cuda:
            torch.cuda.synchronize()

    limit = plan_floor(ft.Plan.parse(plan), s.predictor.config, s.refiner.config, batch, s.dtype, s.device.type)
    benchmark.group = f"{plan} {size}x{size} batch {batch}{' with decoding' if with_vae else ''}"
    benchmark.extra_info |= {
        "rival": rival,
        "plan": plan,
        "size": size,
        "batch": batch,
        "decode": with_vae,
        "guidance": GUIDANCE,
        "first_seconds": first,
        "peak_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "decode_seconds": decode_seconds(size, batch, False) if with_vae else 0.0,
        "floor": limit + (decode_seconds(size, batch, True) if with_vae else 0.0),
        "ceilings": ceilings(s.device.type),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(s.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1, iterations=1)
