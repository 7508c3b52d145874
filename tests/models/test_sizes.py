"""A SiT at sizes other than its own: against an independent program, by every path."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from other_sizes import second_reading, stretched
from sit_sizes import ALL, every, inputs
from tiny import CONFIG, random_sit

from flowturbo.models.checkpoint import load_sit, save_sit
from flowturbo.models.flow_model import ReversedTime
from flowturbo.models.positions import Positions
from flowturbo.models.sit import SiT, SiTConfig, sincos_positions
from flowturbo.solver.steps import Move
from flowturbo_kernels import guide, use_backend, velocity_update

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)
GRIDS = [(1, 1), (2, 2), (5, 5), (3, 2)]


def at_grid(config: SiTConfig, grid: tuple[int, int], seed: int, dtype=torch.float64):
    """x, t, y, and v for a refiner, of so many patches."""
    x, t, y, *_ = inputs(config, seed, dtype=dtype)
    shape = len(x), config.channels, grid[0] * config.patch, grid[1] * config.patch
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "xv")
    return (x, t, y, v) if config.reads_velocity else (x, t, y)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (3, 5)])
@pytest.mark.parametrize("hidden, own", [(8, 1), (72, 4), (192, 8), (1152, 16)])
def test_positions_are_those_of_the_centres_of_patches(hidden, own, grid):
    """Of float32: half a unit in the last place of numbers up to 1."""
    got = sincos_positions(hidden, own, grid)
    expected = stretched(hidden, own, grid)
    assert got.dtype == torch.float32
    assert float((got.double() - expected).abs().max()) <= 2**-25 + 1e-12


@pytest.mark.parametrize("hidden, own", [(8, 1), (72, 3), (192, 8), (1152, 16)])
def test_those_of_its_own_size_are_the_same_bits(hidden, own):
    assert sincos_positions(hidden, own, (own, own)).equal(sincos_positions(hidden, own))


@pytest.mark.parametrize("grid", GRIDS)
@every
def test_the_network_is_the_independent_one(config, grid):
    model = random_sit(config, 1).double()
    batch = at_grid(config, grid, 2)
    got = model(*batch)
    assert got.shape == batch[0].shape
    assert_close(got, second_reading(model, *batch), 1e-14)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 0.03)], ids=str)
def test_in_fewer_bits(dtype, bound):
    config = ALL["patch 2, refiner, learned sigma"]
    x, t, y, v = at_grid(config, (6, 6), 5, dtype)
    got = random_sit(config, 4).to(dtype)(x, t.float(), y, v)
    assert got.dtype == dtype
    assert_close(got, second_reading(random_sit(config, 4).to(dtype), x, t.float(), y, v), bound)


SIGMA = replace(CONFIG, learned_sigma=True, patch=4)
FUSED = {"24": CONFIG, "sigma": SIGMA, "refiner": CONFIG.refiner(2)}


def fused_and_apart(config, grid, guidance, dtype, backend="reference"):
    """evaluate_and_move, and by the independent program with guidance and update apart."""
    model = random_sit(config, 6).to(dtype)
    x, _, y, *rest = at_grid(config, grid, 7, torch.float32)
    N, R = len(x), len(x) if guidance is None else 2 * len(x)
    v = torch.randn(R, *x.shape[1:]) if rest else None
    y = y.clamp(max=config.num_classes - 1)
    modulations = [m[0] for m in model.modulations_at([0.4], y, None if guidance is None else 10)]
    options = {"v": v, "base": v} if rest else {}
    with use_backend(backend):
        got = model.evaluate_and_move(
            x, modulations, Move(x, 0.1), guidance, config.channels, **options
        )
    t, labels = torch.full((R,), 0.4), torch.cat([y, torch.full((R - N,), 10)])
    twice = x if guidance is None else torch.cat([x, x])
    out = second_reading(model, twice, t, labels, v)
    out = out if guidance is None else guide(out, guidance, config.channels)
    velocity = out if v is None else v + out
    return got, (velocity_update(x.double(), [velocity], [0.1]), velocity)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("guidance", [None, 1.5])
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_the_fused_call_is_the_independent_one(config, guidance, grid):
    got, expected = fused_and_apart(config, grid, guidance, torch.float64)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_its_kernels_are_the_independent_program(config):
    got, expected = fused_and_apart(config, (3, 2), 1.5, torch.float32, "triton")
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_in_fp8():
    """By some percent, as at its own size; calibrated at every size that it was trained on."""
    config = replace(CONFIG, sides=(4,))
    batch = at_grid(config, (2, 2), 9, torch.float32)
    got = random_sit(config, 8).quantize_()(*batch)
    assert 1e-4 < relative_error(got, random_sit(config, 8)(*batch)) < 0.1


def test_calibration_sees_every_size(monkeypatch):
    seen = set()
    forward = SiT.forward
    monkeypatch.setattr(
        SiT, "forward", lambda self, x, *rest: seen.add(x.shape[2:]) or forward(self, x, *rest)
    )
    random_sit(replace(CONFIG, sides=(4, 12)), 8).quantize_()
    assert seen == {(8, 8), (4, 4), (12, 12)}


def test_reversed_time():
    model = random_sit(CONFIG, 10).double()
    x, t, y = at_grid(CONFIG, (3, 3), 11)
    assert_close(ReversedTime(model)(x, t, y), -second_reading(model, x, 1 - t, y), 1e-14)


def test_its_own_positions_stay_what_they_are():
    """At its own size a network has its pos_embed, whatever that is; others need SiT's sines."""
    model = random_sit(CONFIG, 12)
    with torch.no_grad():
        model.pos_embed.mul_(1.5)
    assert model.positions(8, 8).data_ptr() == model.pos_embed.data_ptr()
    with pytest.raises(ValueError, match="not the sines of SiT"):
        model.positions(4, 4)


@pytest.mark.parametrize("size", [(5, 4), (4, 3), (0, 4)])
def test_sizes_that_do_not_fit_are_refused(size):
    x = torch.zeros(2, 4, *size)
    with pytest.raises(ValueError, match="multiples of the patch 2"):
        random_sit(CONFIG, 1)(x, torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_each_size_is_computed_once_and_kept_for_its_dtype():
    model = random_sit(CONFIG, 13)
    assert model.positions(4, 4) is model.positions(4, 4)
    assert model.bfloat16().positions(4, 4).dtype == torch.bfloat16
    expected = stretched(48, 4, (2, 2)).float()
    assert model.float().positions(4, 4).equal(expected)
    assert model.double().positions(4, 4).equal(expected.double())
    assert model.to("meta").positions(4, 4).is_meta
    assert set(model.state_dict()) == set(random_sit(CONFIG, 0).state_dict())


def test_a_capture_reads_what_is_kept_and_keeps_nothing(monkeypatch):
    """A graph replays what it captures: positions that are there already need no launches."""
    own = torch.zeros(16, 48)
    own.copy_(sincos_positions(48, 4))
    positions, computed = Positions(48, 4), []
    whole = positions._computed
    monkeypatch.setattr(positions, "_computed", lambda *a: computed.append(a) or whole(*a))
    monkeypatch.setattr("flowturbo.models.positions._capturing", lambda at: True)
    first = positions.at((2, 2), own)
    assert len(computed) == 1
    assert not positions._known
    monkeypatch.setattr("flowturbo.models.positions._capturing", lambda at: False)
    kept = positions.at((2, 2), own)
    assert kept.equal(first)
    computed.clear()
    monkeypatch.setattr("flowturbo.models.positions._capturing", lambda at: True)
    assert positions.at((2, 2), own) is kept
    assert not computed


def test_copies_and_pickles_have_positions_of_their_own():
    model, batch = random_sit(CONFIG, 14), at_grid(CONFIG, (3, 3), 15, torch.float32)
    expected = model(*batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(*batch).equal(expected)
        assert other.positions(6, 6) is not model.positions(6, 6)


def test_positions_found_in_inference_mode_can_train():
    model, (x, t, y) = random_sit(CONFIG, 16), at_grid(CONFIG, (3, 3), 17, torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(x, t, y)
    model.requires_grad_(True)
    expected = random_sit(CONFIG, 16)(x, t, y)
    out = model(x, t, y)
    out.square().sum().backward()
    assert out.detach().equal(expected)
    assert model.x_embedder.proj.weight.grad.abs().max() > 0
    assert model.positions(6, 6).dtype == torch.float32
    assert not model.positions(6, 6).is_inference()


def test_it_trains_under_autocast():
    """At a size first seen there: half of bfloat16's eps, as at its own size."""
    config = ALL["patch 2, predictor, velocity only"]
    batch = at_grid(config, (2, 2), 19, torch.float32)
    truth = random_sit(config, 18)(*batch)
    model = random_sit(config, 18).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch)
    out.float().square().mean().backward()
    assert 0 < relative_error(out, truth) < 2 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_whole(backend):
    """With fixed shapes, without a break; nothing of the graph's is kept."""
    model = random_sit(CONFIG, 20).requires_grad_(True)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for grid in ((2, 2), (4, 4), (3, 3)):
        batch = at_grid(CONFIG, grid, 21, torch.float32)
        assert_close(compiled(*batch), random_sit(CONFIG, 20)(*batch), 2e-6)
    compiled(*at_grid(CONFIG, (2, 2), 22, torch.float32)).sum().backward()
    assert not model._positions._known


def test_nothing_of_a_fake_mode_is_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, batch = random_sit(CONFIG, 23), at_grid(CONFIG, (3, 3), 24, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(*batch)
    assert_close(model(*batch), second_reading(random_sit(CONFIG, 23), *batch), 2e-6)


@pytest.mark.parametrize("reads_velocity", [False, True])
def test_files_say_the_sizes(tmp_path, reads_velocity):
    config = replace(CONFIG, sides=(4, 16), reads_velocity=reads_velocity)
    save_sit(tmp_path / "m.safetensors", random_sit(config, 25))
    role = "refiner" if reads_velocity else "predictor"
    assert load_sit(tmp_path / "m.safetensors", role).model.config == config


def test_files_without_further_sizes_are_what_they_were(tmp_path):
    save_sit(tmp_path / "m.safetensors", random_sit(CONFIG, 26))
    assert b"sides" not in (tmp_path / "m.safetensors").read_bytes()


def test_a_refiner_says_its_own_sizes():
    assert replace(CONFIG, sides=(4,)).refiner(2).sides == ()


def test_products_follow_the_tokens():
    assert CONFIG.macs(CONFIG.tokens) == CONFIG.macs()
    assert CONFIG.macs(4) == replace(CONFIG, side=4).macs()


@pytest.mark.parametrize(
    "sides, error, message",
    [
        ((3,), ValueError, "multiples of the patch 2, got 3"),
        ((0,), ValueError, "sides must be at least 1"),
        ((4, 8), ValueError, "differ from each other and from side, 8"),
        ((4, 4), ValueError, "differ from each other"),
        ((4.0,), TypeError, "sides must be"),
        (4, TypeError, "sides must be a tuple of whole numbers, got 4"),
    ],
)
def test_sizes_that_are_none_are_refused(sides, error, message):
    with pytest.raises(error, match=message):
        replace(CONFIG, sides=sides)


def test_lists_become_tuples():
    assert hash(replace(CONFIG, sides=[4, 16])) == hash(replace(CONFIG, sides=(4, 16)))
