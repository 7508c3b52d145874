"""A call of a network in few launches, with guidance and move, is the same step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from tiny import CONFIG, HEAD_DIM_72, random_sit

from flowturbo.models.flow_model import ReversedTime
from flowturbo.solver.steps import Move
from flowturbo_kernels import guide, use_backend, velocity_update

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)


def both_ways(
    config, dtype, guidance, depth=1, backend="reference", change=lambda network: network
):
    """Moved latents and velocity, by SiT.forward with guidance and update apart, and by
    evaluate_and_move, with the null class's modulations once. A predictor's x is one step ahead.
    """
    N, seed = 3, int(torch.randint(1000, ()))
    R, reads = (N if guidance is None else 2 * N), config.reads_velocity
    network = change(random_sit(replace(config, depth=depth), seed).to(dtype))
    shape = config.channels, config.side, config.side
    x, v, cached = torch.randn(N, *shape), torch.randn(R, *shape), torch.randn(R, *shape)
    at = x if reads else x + 0.3 * v[:N]
    t, y = torch.full((R,), 0.4), torch.cat([torch.arange(N) % 10, torch.full((R - N,), 10)])
    halves = at if guidance is None else torch.cat([at, at])
    out = network(halves.to(dtype), t, y, v.to(dtype) if reads else None).float()
    channels = min(3, config.channels)
    if guidance is not None:
        out = guide(out, guidance, channels)
    velocity = v + out if reads else out
    moved = velocity_update(x, [cached, velocity], [0.05, 0.1])
    null = None if guidance is None else 10
    modulations = [m[0] for m in network.modulations_at([0.4], y[:N], null)]
    assert len(modulations[0]) == N + (guidance is not None)
    rest = {"v": v, "base": v} if reads else {"ahead": (v, 0.3)}
    move = Move(x, 0.1, [cached], [0.05])
    with use_backend(backend):
        fused = network.evaluate_and_move(x, modulations, move, guidance, channels, **rest)
    return (moved, velocity), fused


SIGMA = replace(CONFIG, learned_sigma=True, patch=4)
CONFIGS = {"24": CONFIG.refiner(), "72": HEAD_DIM_72.refiner(), "sigma": SIGMA.refiner()}
CONFIGS |= {f"predictor {name}": c for name, c in (("24", CONFIG), ("sigma", SIGMA))}
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.mark.parametrize("guidance", [None, 1.5])
@every
def test_it_is_the_call_step_by_step(config, guidance):
    apart, fused = both_ways(config, torch.float64, guidance, depth=2)
    for a, b in zip(apart, fused, strict=True):
        assert b.dtype == torch.float32
        assert_close(b, a, 1e-6)


def test_with_reversed_time():
    apart, fused = both_ways(CONFIG, torch.float64, 1.5, change=ReversedTime)
    for a, b in zip(apart, fused, strict=True):
        assert_close(b, a, 1e-6)


def test_in_fp8():
    """Its products round so coarsely that the last bit of an input may change much."""
    apart, fused = both_ways(CONFIG, torch.float32, 1.5, change=lambda sit: sit.quantize_())
    for a, b in zip(apart, fused, strict=True):
        assert_close(b, a, 0.02)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("guidance", [None, 1.5])
@every
def test_its_kernels_are_its_reference(config, guidance):
    for a, b in zip(*both_ways(config, torch.float32, guidance, backend="triton"), strict=True):
        assert_close(b, a, 1e-5)


@pytest.mark.parametrize("config", [CONFIG, CONFIG.refiner()], ids=["predictor", "refiner"])
def test_in_16_bits_it_errs_no_more_than_step_by_step(config):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    truth, _ = both_ways(config, torch.float64, 1.5)
    torch.random.set_rng_state(state)
    apart, fused = both_ways(config, torch.bfloat16, 1.5)
    for t, a, b in zip(truth, apart, fused, strict=True):
        assert relative_error(b, t) <= 1.2 * relative_error(a, t)


def test_another_base_and_origin():
    """As the second half of a Heun-like refiner step has them: it reads the cached velocity and
    corrects the first refined one.
    """
    network = random_sit(CONFIG.refiner(), 1).double()
    x, origin, v, base = (torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(4))
    t, y = torch.full((2,), 0.7), torch.tensor([1, 5])
    refined = base + network(x, t, y, v)
    modulations = network.modulations(network.t_embedder(t) + network.y_embedder(y))
    got = network.evaluate_and_move(x, modulations, Move(origin, 0.2), None, 4, v=v, base=base)
    assert_close(got[0], origin + 0.2 * refined, 1e-14)
    assert_close(got[1], refined, 1e-14)
