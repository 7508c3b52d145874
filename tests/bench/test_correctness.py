"""A rival whose latents or images are wrong is said to be wrong, and is not timed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from paths import ROOT
from stopwatch import Stopwatch
from torch import Tensor

from flowturbo.models.sit import SiT

sys.path.insert(0, str(ROOT / "bench"))

import correctness
import rivals
import subjects
import test_plans
from sampling import Sampler

HERE = ["ours", "ours-eager", "ours-fp8", "eager", "autocast"]
"""Those that run on the CPU without compiling."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_plans, "_prepared", {})
    monkeypatch.setattr(test_plans, "ceilings", lambda device: {})
    monkeypatch.setattr(test_plans, "limit_of", lambda *_: 0.0)
    monkeypatch.setattr(test_plans, "decode_seconds", lambda *_: 0.0)


def timed(rival: str, decode: str = "yes") -> Stopwatch:
    benchmark = Stopwatch()
    test_plans.test_plan(benchmark, 1, rival, 64, 2, decode, "H1R1")
    return benchmark


@pytest.mark.parametrize("rival", HERE)
def test_what_is_right_is_timed_and_its_differences_are_kept(rival):
    found = timed(rival).extra_info["apart"]
    products = found["latents"], found["images"]
    dtype = {"ours-fp8": torch.float8_e4m3fn, "autocast": torch.bfloat16}.get(rival, torch.float32)
    assert all(value <= correctness.BOUNDS[dtype] for value in products)
    assert list(timed(rival, "no").extra_info["apart"]) == ["latents"]


def broken(part: str) -> Callable[[subjects.Subject], Sampler]:
    """Ours with one product of one block that gives nought."""

    def without(network: SiT) -> SiT:
        network = copy.deepcopy(network)
        network.get_submodule(part.partition(".")[2]).weight.zero_()
        return network

    def rival(s: subjects.Subject) -> Sampler:
        which = part.partition(".")[0]
        return rivals.ours(replace(s, **{which: without(getattr(s, which))}))

    return rival


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[subjects.Subject], Sampler]:
    """Ours whose latents or images are changed."""

    def rival(s: subjects.Subject) -> Sampler:
        sampler = rivals.ours(s)
        return replace(sampler, run=lambda s, plan: change(sampler.run(s, plan)))

    return rival


def without_numbers(result: Tensor) -> Tensor:
    return result * float("nan") if result.is_floating_point() else result


def black(result: Tensor) -> Tensor:
    return result if result.is_floating_point() else torch.zeros_like(result)


@pytest.mark.parametrize(
    "rival, why",
    [
        (broken("predictor.blocks.1.mlp.fc2"), "latents are"),
        (broken("predictor.blocks.0.attn.proj"), "latents are"),
        (broken("refiner.blocks.0.mlp.fc2"), "latents are"),
        (changed(lambda result: result.flip(0)), "latents are"),
        (changed(without_numbers), "latents are not finite"),
        (changed(black), "images are"),
    ],
    ids=["mlp", "attention", "refiner", "images in another order", "NaN", "black images"],
)
@pytest.mark.parametrize("name", ["ours", "ours-fp8"])
def test_what_is_wrong_is_not_timed(name, rival, why, monkeypatch):
    """Whatever the dtype that it may err by."""
    monkeypatch.setitem(rivals.RIVALS, name, rival)
    benchmark = Stopwatch()
    with pytest.raises(pytest.fail.Exception, match=f"^wrong: {why}"):
        test_plans.test_plan(benchmark, 1, name, 64, 2, "yes", "H1R1")
    assert not benchmark.timed


def test_what_is_compared_last_is_what_is_timed(monkeypatch):
    """A graph of the whole plan with decoding: that of latents alone took its place before."""
    decoded = []

    def rival(s: subjects.Subject) -> Sampler:
        sampler = rivals.ours(s)
        return replace(
            sampler, run=lambda s, plan: decoded.append(s.decode) or sampler.run(s, plan)
        )

    monkeypatch.setitem(rivals.RIVALS, "ours", rival)
    assert timed("ours").timed
    assert decoded == [True, True, False, True]


def test_networks_of_other_weights_are_compared_with_nothing(monkeypatch):
    monkeypatch.setitem(rivals.RIVALS, "diffusers", broken("predictor.blocks.1.mlp.fc2"))
    assert timed("diffusers").extra_info["apart"] == {}


def test_nothing_is_compared_on_the_stand_in(monkeypatch):
    monkeypatch.setattr(test_plans, "STAND_IN", True)
    monkeypatch.setitem(rivals.RIVALS, "ours", changed(without_numbers))
    assert timed("ours").timed
