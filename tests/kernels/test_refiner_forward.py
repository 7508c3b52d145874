"""The refiner in few launches is the refiner step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from tiny import CONFIG, HEAD_DIM_72, random_sit

from flowturbo_kernels import guide, refiner_forward, use_backend, velocity_update
from flowturbo_kernels._triton import Kernel

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)


def both_ways(config, dtype, guidance, depth=1, backend="reference", by_index=False):
    """Moved latents and refined velocity, by SiT.forward with guidance and update apart, and by
    refiner_forward. by_index: with the null class's modulations once.
    """
    N, seed = 3, int(torch.randint(1000, ()))
    R = N if guidance is None else 2 * N
    network = random_sit(config.refiner(depth), seed).to(dtype)
    shape = config.channels, config.side, config.side
    x, v, cached = torch.randn(N, *shape), torch.randn(R, *shape), torch.randn(R, *shape)
    t, y, null = torch.full((R,), 0.4), torch.arange(R) % 10, config.null_class
    if guidance is not None:
        y[N:] = null
    halves = x if guidance is None else torch.cat([x, x])
    offset = network(halves.to(dtype), t, y, v.to(dtype)).float()
    if guidance is not None:
        offset = guide(offset, guidance, min(3, config.channels))
    refined = v + offset
    moved = velocity_update(x, [cached, refined], [0.05, 0.1])
    modulations = network.modulations(network.t_embedder(t) + network.y_embedder(y))
    if by_index:
        modulations = [m[: N + 1] for m in modulations]
    with use_backend(backend):
        fused = refiner_forward(
            network.refiner_weights(), modulations, x, v, guidance, min(3, config.channels), 0.1,
            velocities=[cached], velocity_weights=[0.05],
        )  # fmt: skip
    return (moved, refined), fused


CONFIGS = {"24": CONFIG, "72": HEAD_DIM_72, "sigma": replace(CONFIG, learned_sigma=True, patch=4)}


cases = pytest.mark.parametrize(
    "guidance, by_index", [(None, False), (1.5, False), (1.5, True)], ids=["plain", "2N", "N+1"]
)


@cases
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_step_by_step_refiner(config, guidance, by_index):
    apart, fused = both_ways(config, torch.float64, guidance, depth=2, by_index=by_index)
    for a, b in zip(apart, fused, strict=True):
        assert b.dtype == torch.float32
        assert_close(b, a, 1e-6)


@pytest.mark.slow
@interpreted
@cases
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_its_kernels_are_its_reference(config, guidance, by_index):
    found = both_ways(config, torch.float32, guidance, backend="triton", by_index=by_index)
    for a, b in zip(*found, strict=True):
        assert_close(b, a, 1e-5)


@interpreted
@pytest.mark.parametrize("depth", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_its_launches(depth, monkeypatch):
    names = []
    launch = Kernel.launch
    monkeypatch.setattr(
        Kernel, "launch", lambda self, *a, **k: names.append(self) or launch(self, *a, **k)
    )
    both_ways(CONFIG, torch.float32, 1.5, depth, "triton")
    assert len(names) == 2 + 7 * depth


def test_in_16_bits_it_errs_no_more_than_step_by_step():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    truth, _ = both_ways(CONFIG, torch.float64, 1.5)
    torch.random.set_rng_state(state)
    apart, fused = both_ways(CONFIG, torch.bfloat16, 1.5)
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
    got = refiner_forward(network.refiner_weights(), modulations, x, v, None, 4, 0.2, origin, base)
    assert_close(got[0], origin + 0.2 * refined, 1e-14)
    assert_close(got[1], refined, 1e-14)


def test_a_predictor_has_no_refiner_weights():
    with pytest.raises(ValueError, match="this one is a predictor"):
        random_sit(CONFIG, 0).refiner_weights()
    with pytest.raises(ValueError, match="not quantised"):
        random_sit(CONFIG.refiner(), 0).quantize_().refiner_weights()
