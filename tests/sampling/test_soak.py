"""Thousands of calls of one model: nothing grows, and no image is another call's."""

from __future__ import annotations

import functools
import gc
import os
import random
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_recorder import Fake
from torch import Tensor

import flowturbo as ft

CALLS = int(os.environ.get("FLOWTURBO_SOAK_CALLS", "2000"))
"""Of the long run; ten thousand take a quarter of an hour."""
PLANS = ["E1", "A2", "E1R1"]
SEEDS, THREADS, LIMIT = 3, 3, 12
CLOSE = 1e-4
"""How near the same image is from a batch of another size; other images are 1 apart."""


class _Alive:
    """The tensors that still exist, of those that were added."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Tensor]] = []

    def append(self, tensor: Tensor) -> None:
        self.references = [r for r in self.references if r() is not None] + [weakref.ref(tensor)]

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor for r in self.references if (tensor := r()) is not None)


class Stopped(Exception):
    pass


class Soak:
    """A model with captures by a stand-in, and what each image of it must be."""

    def __init__(self) -> None:
        self.model, self.plain = (ft.load("digits", device="cpu") for _ in range(2))
        recorder = Fake()
        recorder.buffers = _Alive()  # its own list would grow
        self.model.captures.limit, self.model.captures.recorder = LIMIT, recorder
        self.images, self.lock = (
            np.random.default_rng(0).random((4, 1, 8, 8), np.float32),
            threading.Lock(),
        )
        self.done: Counter[str] = Counter()

    @functools.cache  # noqa: B019  (as long as the test)
    def truth(self, plan: str, label: int, seed: int, number: int, guidance: float) -> Tensor:
        """Image `number` of a call with this seed, alone and without captures."""
        noise = ft.noise((1, 8, 8), seed, [number])
        return ft.sample(self.plain, plan, [label], noise=noise, guidance=guidance)[0]

    @functools.cache  # noqa: B019
    def edited(self, plan: str, label: int, seed: int, number: int) -> Tensor:
        noise, source = ft.noise((1, 8, 8), seed, [number]), self.source(number)
        return ft.edit(self.plain, plan, source, [label], noise=noise, output="latents")[0]

    def source(self, number: int) -> Tensor:
        return torch.from_numpy(self.images[number : number + 1] * 2 - 1)

    def call(self, number: int) -> None:
        """One call, whose kind, arguments and expected result follow from its number."""
        draw = random.Random(number)
        plan, seed = draw.choice(PLANS), draw.randrange(SEEDS)
        labels = [draw.randrange(10) for _ in range(draw.choice([1, 1, 2]))]
        guidance = draw.choice([1.0, 2.0])
        options = dict(guidance=guidance, seed=seed)
        kind = draw.choices(
            ["latents", "images", "batches", "watched", "edited", "failing", "refused"],
            [5, 4, 2, 1, 1, 1, 1],
        )[0]
        with self.lock:
            self.done[kind] += 1
        if kind == "failing":

            def fail(info: ft.StepInfo) -> None:
                raise Stopped

            with pytest.raises(Stopped):
                ft.sample(self.model, plan, labels, callback=fail, **options)
            return
        if kind == "refused":
            with pytest.raises(ValueError, match="labels must be from 0 to 9"):
                ft.sample(self.model, plan, [*labels, 10], **options)
            return
        if kind == "edited":
            sources = torch.cat([self.source(i) for i in range(len(labels))])
            got = ft.edit(self.model, plan, sources, labels, seed=seed, output="latents")
            expected = [self.edited(plan, label, seed, i) for i, label in enumerate(labels)]
        else:
            if kind == "images":
                options["output"] = "uint8"
            if kind == "batches":
                options["batch_size"] = 2
            if kind == "watched":
                options["callback"] = lambda info: None
            got = ft.sample(self.model, plan, labels, **options)
            expected = [self.truth(plan, y, seed, i, guidance) for i, y in enumerate(labels)]
        if kind == "images":
            levels = (127.5 * torch.stack(expected) + 128).clamp(0, 255)[:, 0, ..., None]
            assert (got - levels).abs().max() < 1 + 128 * CLOSE, number
        else:
            assert (got - torch.stack(expected)).abs().max() < CLOSE, number

    def size(self) -> dict[str, int]:
        """What may not grow."""
        self.model.captures.clear()  # how many there are is bounded, and no growth
        gc.collect()
        objects = gc.get_objects()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "tensors": sum(issubclass(type(o), Tensor) for o in objects),
            "objects": len(objects),
            "MiB": pages * 4 // 1024,
            "threads": threading.active_count(),
            "met": len(self.model.captures._met),
        }


def soak(calls: int, warm_up: int) -> None:
    soaked = Soak()
    for plan in PLANS:  # the expected images, which are kept, are no growth
        for label in range(10):
            for seed in range(SEEDS):
                if calls > 1000:
                    for number in range(2):
                        soaked.edited(plan, label, seed, number)
                        for guidance in (1.0, 2.0):
                            soaked.truth(plan, label, seed, number, guidance)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(soaked.call, range(warm_up)))
        before, known = soaked.size(), Soak.truth.cache_info().currsize
        list(pool.map(soaked.call, range(warm_up, calls)))
        assert len(soaked.model.captures.report()) <= LIMIT
        after = soaked.size()
    more = Soak.truth.cache_info().currsize - known + 200
    captures = soaked.model.captures
    assert not captures.refused()
    assert after["threads"] == before["threads"]
    assert after["met"] <= 64 + 4 * LIMIT
    assert after["tensors"] <= before["tensors"] + 2 * more
    assert after["objects"] <= before["objects"] + 20 * more + 2000
    assert after["MiB"] <= before["MiB"] + 48, (before, after)
    assert len(soaked.done) >= 6
    assert captures.recorder.replayed > calls / 8
    for kind in (Soak.truth, Soak.edited):
        kind.cache_clear()


@pytest.fixture(autouse=True)
def one_thread_a_call() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_hundred_calls():
    soak(90, 30)


@pytest.mark.slow
def test_thousands_of_calls():
    soak(CALLS, CALLS // 10)
