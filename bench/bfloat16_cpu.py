"""bfloat16 against float32 on the CPU: whole calls, and the parts of a block, in turn in one run.

    python bench/bfloat16_cpu.py --out bfloat16_cpu.md
    python bench/bfloat16_cpu.py --models SiT-S/2 --batches 1 --pairs 20

A whole call is guided sampling by one predictor call, modulations and noise included. Beside it
stand one block's matrix products alone, the limit of what bfloat16 can give, and the other parts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from machine import code
from subjects import GUIDANCE, open_gates
from torch import Tensor

import flowturbo as ft
from flowturbo.models.random_weights import filled
from flowturbo.models.sit import SIT_CONFIGS, SiTConfig
from flowturbo.runtime.cpu_dtype import bfloat16_instructions
from flowturbo.runtime.device import device_name
from flowturbo_kernels import attention, gated_residual_adaln, linear
from flowturbo_kernels.batch_invariant import gelu_tanh, gelu_tanh_bfloat16

CPU = torch.device("cpu")
DTYPES = torch.float32, torch.bfloat16
Run = Callable[[], object]


class Line(NamedTuple):
    """What was timed, the least milliseconds in each dtype, and the median of the pairs' ratios."""

    name: str
    float32: float
    bfloat16: float
    ratio: float

    def __str__(self) -> str:
        least = self.bfloat16 / self.float32
        return (
            f"| {self.name} | {self.float32:.2f} | {self.bfloat16:.2f} | {least:.2f} | "
            f"{self.ratio:.2f} |"
        )


def in_turn(name: str, wide: Run, narrow: Run, pairs: int) -> Line:
    """Time the two in turn, so that other work on the machine slows both alike. A single thread is
    timed by what it has computed, not by the clock.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[], []]
    wide()
    narrow()
    for _ in range(pairs):
        for run, taken in zip((wide, narrow), times, strict=True):
            start = clock()
            run()
            taken.append(1e3 * (clock() - start))
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return Line(name, min(times[0]), min(times[1]), ratio)


def call(config: SiTConfig, batch: int, dtype: torch.dtype) -> Run:
    """A guided call of the predictor, through `ft.sample`."""
    network = open_gates(filled(config, CPU, 0))
    model = ft.load(network, device=CPU, dtype=dtype)
    labels = [i % config.num_classes for i in range(batch)]
    return partial(ft.sample, model, "E1", labels, guidance=GUIDANCE, seed=0)


def parts(config: SiTConfig, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """The parts of one block, on rows of both halves of guidance."""
    B, T, D = 2 * batch, (config.side // config.patch) ** 2, config.hidden

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    products = [
        partial(linear, random(B, T, K), random(N, K) / K**0.5, random(N))
        for K, N in ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))
    ]
    yield "products", lambda: [product() for product in products]
    qkv = random(B, T, 3, config.heads, D // config.heads)
    yield "attention", partial(attention, qkv)
    yield "attention, widened", lambda: attention(qkv.float()).to(dtype)
    h, narrow = random(B, T, 4 * D), dtype == torch.bfloat16
    yield "GELU", lambda: gelu_tanh_bfloat16(h.clone()) if narrow else gelu_tanh(h)
    x, y, modulation = random(B, T, D), random(B, T, D), random(B, 3 * D).chunk(3, dim=-1)
    yield (
        "residual and adaLN, twice",
        lambda: [gated_residual_adaln(x, y, *modulation) for _ in range(2)],
    )


def lines(config: SiTConfig, batch: int, pairs: int) -> Iterator[Line]:
    """Those of one size and batch."""
    yield in_turn("whole call", *(call(config, batch, dtype) for dtype in DTYPES), pairs)
    for (name, wide), (_, narrow) in zip(*(parts(config, batch, d) for d in DTYPES), strict=True):
        yield in_turn(name, wide, narrow, pairs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["SiT-S/2", "SiT-B/2", "SiT-XL/2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--depth", type=int, default=1, help="blocks of the predictor")
    parser.add_argument("--pairs", type=int, default=15, help="timings in each dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a file for the table, in Markdown")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    settings = _arguments()
    torch.set_num_threads(settings.threads)
    names = ", ".join(bfloat16_instructions()) or "no bfloat16 instructions"
    shown = [
        f"{device_name(CPU)} ({names}), {settings.threads} threads, torch {torch.__version__}, "
        f"{code()}; {settings.pairs} pairs in turn. Milliseconds are the least of each"
        f"{', CPU time' if settings.threads == 1 else ''}; load is "
        "the number of processes that were running or waiting.",
        "",
        "| | float32 | bfloat16 | ratio of these | median ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    print("\n".join(shown), flush=True)
    for name in settings.models:
        config = replace(SIT_CONFIGS[name], depth=settings.depth)
        for batch in settings.batches:
            for line in lines(config, batch, settings.pairs):
                label = f"{name}, {settings.depth} blocks, batch {batch}: {line.name}"
                if line.name == "whole call" and hasattr(os, "getloadavg"):
                    label += f" (load {os.getloadavg()[0]:.1f})"
                shown.append(str(line._replace(name=label)))
                print(shown[-1], flush=True)
    if settings.out:
        settings.out.write_text("\n".join(shown) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
