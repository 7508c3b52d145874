"""Caches of diffusers and cache-dit beside plans: the documented recipes run, skip what the page
says, and are undone to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import relative_error
from pipelines import call, diffusers, flux, flux_transformer, sd3, sd3_transformer
from torch import Tensor

import flowturbo as ft

THRESHOLD = 0.1
"""With these weights: above the change between calls at one noise level, below all others."""


def pairs(plan: str) -> int:
    """How many predictor calls are at the noise level of the call before."""
    times = [c.t for c in ft.Plan.parse(plan).calls]
    return sum(a == b for a, b in itertools.pairwise(times))


def a_flux() -> Any:
    return flux(transformer=flux_transformer(num_layers=2, num_single_layers=2))


def an_sd3() -> Any:
    return sd3(transformer=sd3_transformer(num_layers=4))


class Watched:
    """A pipeline, and how many calls ran its blocks after the first."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.ran = pipe, 0
        network = pipe.transformer
        blocks = getattr(network, "single_transformer_blocks", network.transformer_blocks)
        inner = getattr(blocks[1], "norm1", None) or blocks[1].norm

        def ran(*_: Any) -> None:
            self.ran += 1

        inner.linear.register_forward_hook(ran)

    def call(self, **options: Any) -> tuple[Tensor, int]:
        """(latents, calls that ran the blocks)."""
        self.ran = 0
        latents = call(self.pipe, **options)
        return latents, self.ran


def check_recipe(
    watched: Watched,
    plan: str,
    cache: tuple[Callable[[], object], Callable[[], object]],
    cache_first: bool,
    full_calls: int,
) -> None:
    """Plan and cache, switched on in one order and off in the other."""
    pipe = watched.pipe
    stock, _ = watched.call(num_inference_steps=6)
    with ft.accelerated(pipe, plan):
        plain, calls = watched.call()
    assert calls == ft.Plan.parse(plan).cost.predictor
    switches = [cache, (lambda: ft.accelerate(pipe, plan), lambda: ft.restore(pipe))]
    switches = switches if cache_first else switches[::-1]
    for on, _ in switches:
        on()
    cached, ran = watched.call()
    assert ran == full_calls
    again, ran = watched.call()
    assert ran == full_calls
    assert again.equal(cached)  # nothing is left of the run before
    assert (relative_error(cached, plain) == 0) == (ran == calls)
    assert relative_error(cached, plain) < 0.1
    switches[1][1]()
    if not cache_first:
        assert watched.call()[0].equal(plain)
    switches[0][1]()
    restored, ran = watched.call(num_inference_steps=6)
    assert restored.equal(stock)
    assert ran == 6


def of_diffusers(pipe: Any, config: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: pipe.transformer.enable_cache(config), pipe.transformer.disable_cache


@pytest.mark.parametrize(
    "plan, cache_first",
    [("A7", True), ("H1P5", False), ("H1A5", True), ("H2P2E1", False), ("H3E1", True)],
)
def test_first_block_cache_skips_calls_in_pairs(plan, cache_first):
    pipe = a_flux()
    cache = of_diffusers(pipe, diffusers.FirstBlockCacheConfig(threshold=THRESHOLD))
    check_recipe(Watched(pipe), plan, cache, cache_first, 7 - pairs(plan))


@pytest.mark.parametrize("plan, full, cache_first", [("A7", 5, True), ("A10", 6, False)])
def test_taylorseer_skips_every_second_call_after_the_third(plan, full, cache_first):
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=3, use_lite_mode=True
    )
    pipe = a_flux()
    check_recipe(Watched(pipe), plan, of_diffusers(pipe, config), cache_first, full)


@pytest.fixture
def cache_dit() -> Any:
    return pytest.importorskip("cache_dit")


@pytest.mark.parametrize("plan, cache_first", [("A7", True), ("H1A5", False), ("H3E1", True)])
@pytest.mark.parametrize("make", [a_flux, an_sd3])
def test_dbcache_skips_calls_in_pairs(cache_dit, make, plan, cache_first):
    pipe = make()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=THRESHOLD
    )
    cache = (
        lambda: cache_dit.enable_cache(pipe, cache_config=config),
        lambda: cache_dit.disable_cache(pipe),
    )
    check_recipe(Watched(pipe), plan, cache, cache_first, 7 - pairs(plan))


def test_dbcache_as_it_comes_never_skips_in_seven_calls(cache_dit):
    """Its first eight calls are there to warm up."""
    pipe = a_flux()
    watched = Watched(pipe)
    with ft.accelerated(pipe, "H3E1"):
        plain, _ = watched.call()
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
        latents, ran = watched.call()
        cache_dit.disable_cache(pipe)
    assert ran == 7
    assert latents.equal(plain)


def test_pairs_are_counted_by_hand():
    assert [pairs(p) for p in ("A7", "E7", "H1P5", "H1A5", "H1P4E1", "H2P2E1", "H3E1")] == [
        *(0, 0, 0, 1, 1, 2, 3)
    ]
    assert torch.tensor([c.t for c in ft.Plan.parse("H3E1").calls]).unique().numel() == 4
