"""Sampling whole plans, noise to images: this library against its rivals, beside the device's
limit.

    python -m pytest bench/test_plans.py --benchmark-json=plans.json && python bench/table.py
    plans.json

SiT-XL/2 with random weights and SD's decoder, guidance on, in bfloat16; without a GPU a small
model, which measures only that it runs. --plans, --batches, --sizes, --decode and --rivals choose;
the whole takes hours, since every rival compiles. A rival whose latents or images are not those of
plain eager torch fails, and is not timed.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from typing import Any, NamedTuple

import pytest
import torch
from correctness import differences
from harness import collect
from limits import limit_of, products_of
from machine import STAND_IN, device_name
from report import WRONG
from rivals import RIVALS, Unavailable
from roofline import ceilings
from sampling import Sampler, tuned_convolutions
from subjects import DECODER, DEPTH, Subject, subject

from flowturbo.evaluation.latency import fresh_peak
from flowturbo.models.vae import DiffusersVAE
from flowturbo.runtime.device import seconds

ROUNDS = 5

CACHES = "FLOWTURBO_BENCH_CACHES"
"""In the environment: "cold" where the caches of Triton and Inductor were empty at the start."""


class Prepared(NamedTuple):
    """What is sampled, by whom, the seconds of setting that up, and whether the caches were cold:
    nobody has filled them in this process either.
    """

    subject: Subject
    sampler: Sampler
    setup: float
    cold: bool


_prepared: dict[tuple[str, int, int, bool], Prepared | Unavailable] = {}
_made: list[str] = []
"""The rivals that were made in this process."""


def prepared(rival: str, size: int, batch: int, decode: bool) -> Prepared:
    """The last one is kept, and given up before another is made."""
    key = rival, size, batch, decode
    if key not in _prepared:
        _prepared.clear()
        collect()
        s = subject(size, batch, decode)
        cold = os.environ.get(CACHES) == "cold" and not _made
        _made.append(rival)
        began = time.perf_counter()
        try:
            _prepared[key] = Prepared(s, RIVALS[rival](s), time.perf_counter() - began, cold)
        except Unavailable as reason:
            _prepared[key] = reason.with_traceback(None)
    found = _prepared[key]
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def decode_seconds(size: int, batch: int) -> float:
    """Of the plain decoder by itself."""
    s = subject(size, batch, True)
    vae = DiffusersVAE(s.vae)
    with torch.no_grad(), tuned_convolutions():
        vae.decode(s.noise)
        return statistics.median(seconds(lambda: vae.decode(s.noise), s.device) for _ in range(3))


def group(plan: str, size: int, batch: int, decode: str) -> str:
    """What is sampled; a trial's smaller networks are no one else's group."""
    trial = [f"{os.environ[DEPTH]} blocks"] if os.environ.get(DEPTH) else []
    trial += [f"{os.environ[DECODER]} decoder"] if os.environ.get(DECODER) else []
    tried = f" ({', '.join(trial)})" if trial else ""
    decoding = " with decoding" if decode == "yes" else ""
    return f"{plan} {size}x{size} batch {batch}{decoding}{tried}"


def about(rival: str, size: int, batch: int, decode: str, plan: str) -> dict[str, str]:
    return {"group": group(plan, size, batch, decode), "who": rival}


def test_plan(
    benchmark: Any, rounds: int, rival: str, size: int, batch: int, decode: str, plan: str
) -> None:
    with_vae = decode == "yes"
    try:
        s, sampler, setup, cold = prepared(rival, size, batch, with_vae)
    except Unavailable as reason:
        pytest.skip(str(reason))
    cuda = s.device.type == "cuda"
    # before memory is counted: what it leaves behind is in every rival's peak, or in none
    limits = ceilings(s.device.type)
    fresh_peak(s.device)
    first = setup + seconds(lambda: sampler(plan), s.device)
    result = sampler(plan)
    assert result.shape == (
        (batch, size, size, 3) if with_vae else (batch, 4, size // 8, size // 8)
    )
    peak = torch.cuda.max_memory_reserved() if cuda else None
    apart, why = ({}, None) if STAND_IN else differences(rival, sampler, plan)
    if why:
        pytest.fail(f"{WRONG}{why}", pytrace=False)

    def run() -> None:
        sampler(plan)
        if cuda:
            torch.cuda.synchronize()

    benchmark.group = group(plan, size, batch, decode)
    benchmark.extra_info |= {
        "rival": rival,
        "plan": plan,
        "size": size,
        "batch": batch,
        "decode": with_vae,
        "guidance": s.guidance,
        **s.about,
        "products": str(products_of(rival, s)).removeprefix("torch."),
        "settings": sampler.settings,
        "first_seconds": first,
        "caches": "cold" if cold else "warm",
        "apart": apart,
        "peak_bytes": peak,
        "decode_seconds": decode_seconds(size, batch) if with_vae else 0.0,
        "floor": limit_of(rival, plan, s),
        "ceilings": limits,
        "device": device_name(),
        "dtype": str(s.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1, iterations=1)
