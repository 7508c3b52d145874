"""UniPC-2, DPM-Solver++ 2M and res_2s are diffusers' schedulers and independent formulas, in every
mixture with other steps.
"""

from __future__ import annotations

import math

import exponential
import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from exponential import by_diffusers, dpm_without_rounding, scheduler_of, written_out
from fake_recorder import LABELS, captured_model, plain
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo import Plan
from flowturbo.runtime import rng
from flowturbo.sampling.velocity_field import GuidedField
from flowturbo.solver import state as states
from flowturbo.solver.exponential import log_snr, phi
from flowturbo.solver.state import KEPT_STATES, MAX_PAST, Field, Move, State
from flowturbo_kernels.velocity_update import MAX_VELOCITIES

MIX = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2


def velocity(x: Tensor, t: float) -> Tensor:
    """Nonlinear in x and t."""
    return torch.tanh(x @ MIX[0].to(x.dtype) + t) - 0.4 * x + math.sin(3 * t)


def both_halves(x: Tensor, t: float) -> Tensor:
    """Twice the rows of x, as under guidance."""
    return torch.cat([velocity(x, t), torch.cos(x @ MIX[1].to(x.dtype) - t)])


class Function(Field):
    def __init__(self, v) -> None:
        self.v = v

    def predict(self, x: Tensor, t: float) -> Tensor:
        return self.v(x, t)


def run(plan: Plan, v, x: Tensor) -> Tensor:
    state = State(x)
    for step, t0, t1 in plan.schedule():
        state = step(Function(v), state, t0, t1)
    return state.x


def on_grid_of(scheduler, letter: str) -> Plan:
    """The plan on diffusers' grid, which starts at a noise level just below 1."""
    times = tuple(1 - sigma for sigma in scheduler.sigmas.tolist())
    return Plan(letter * (len(times) - 1), times, start=times[0])


def noise(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("letter", "UD")
def test_a_plan_is_diffusers_own_scheduler_on_its_grid(letter, steps, shift):
    pytest.importorskip("diffusers")
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        scheduler, x = scheduler_of(letter, shift), noise(steps, dtype)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.to(dtype)
        wide = letter == "D" and dtype == torch.float64
        expected = (dpm_without_rounding if wide else by_diffusers)(scheduler, velocity, x)
        plan = on_grid_of(scheduler, letter)
        assert plan.cost.predictor == steps
        assert_close(run(plan, velocity, x), expected, bound)
        if steps > 2:  # every other letter is another method
            for another in set("UDEA") - {letter}:
                other = Plan(another * steps, plan.grid, start=plan.start)
                assert relative_error(run(other, velocity, x), expected) > 10 * bound


def test_a_plan_from_noise_has_diffusers_limit():
    """Ours starts at noise level 1, diffusers' at 1 - 1e-6: the difference is as small."""
    pytest.importorskip("diffusers")
    scheduler, x = scheduler_of("U"), noise(0)
    scheduler.set_timesteps(6)
    scheduler.sigmas = scheduler.sigmas.double()
    expected = by_diffusers(scheduler, velocity, x)
    grid = on_grid_of(scheduler, "U").grid
    for letter in "UD":
        ours = run(Plan(letter * 6, (0.0, *grid[1:])), velocity, x)
        near = run(Plan(letter * 6, (1e-6, *grid[1:]), start=1e-6), velocity, x)
        assert_close(ours, near, 2e-6)
        nearer = run(Plan(letter * 6, (1e-9, *grid[1:]), start=1e-9), velocity, x)
        assert_close(ours, nearer, 2e-9)
    assert_close(run(Plan("U" * 6, (0.0, *grid[1:])), velocity, x), expected, 1e-5)
    assert log_snr(0.0) == pytest.approx(math.log(1e-6), abs=1e-5)


@pytest.mark.parametrize("letter", "UDX")
@pytest.mark.parametrize(
    "grid",
    [(0.0, 1e-7, 2e-7, 1.0), (0.0, 0.3, 1 - 1e-9, 1.0), (0.0, 0.5, 0.5 + 1e-9, 1.0)],
)
def test_extreme_grids_give_finite_results(letter, grid):
    result = run(Plan(letter * 3, grid), velocity, noise(2))
    assert result.isfinite().all()
    assert relative_error(result, run(Plan("E" * 3, grid), velocity, noise(2))) < 1


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
def test_res_is_an_independent_exponential_runge_kutta_method(steps, shift):
    plan = Plan.parse(f"X{steps}", shift=shift)
    assert plan.cost.predictor == 2 * steps - 1
    expected = x = noise(steps)
    for t0, t1 in zip(plan.grid, plan.grid[1:], strict=False):
        expected = exponential.res_2s(velocity, expected, t0, t1)
    assert_close(run(plan, velocity, x), expected, 1e-13)
    assert_close(run(plan, velocity, x.float()), expected, 2e-6)
    if steps > 1:
        assert relative_error(run(Plan.parse(f"H{steps}"), velocity, x), expected) > 1e-4


@given(
    st.text(alphabet="UDXEAH", min_size=1, max_size=9),
    st.lists(st.floats(0.02, 1), min_size=10, max_size=10),
    st.sampled_from([0.0, 0.25]),
)
def test_every_mixture_of_steps_is_the_one_written_out(letters, gaps, start):
    """In denoised states, with UniC from the corrected state before; under guidance."""
    gaps = gaps[: len(letters)]
    inner = start + (1 - start) * np.cumsum(gaps[:-1]) / sum(gaps)
    grid = (start, *inner.tolist(), 1.0)
    plan, x = Plan(letters, grid, start=start), noise(len(letters))
    assert_close(run(plan, both_halves, x), written_out(letters, grid, both_halves, x), 1e-11)


def test_phi_functions_are_their_integrals():
    """phi_k(z) is the integral of exp((1 - u) z) u^(k-1) / (k-1)! over [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u, w = (nodes + 1) / 2, weights / 2
    for z in (-12.0, -3.0, -1.001, -1.0, -0.4, -1e-3, -1e-9):
        assert phi(0, z) == pytest.approx(math.exp(z), rel=1e-14)
        for k in (1, 2, 3):
            integral = float((w * np.exp((1 - u) * z) * u ** (k - 1)).sum()) / math.factorial(k - 1)
            assert phi(k, z) == pytest.approx(integral, rel=1e-12)


class Fusing(Field):
    """Counts the operations on states besides those that go with a call of the network."""

    def __init__(self, monkeypatch) -> None:
        self.calls = self.apart = 0
        update = states.velocity_update

        def counted(*args):
            self.apart += 1
            return update(*args)

        monkeypatch.setattr(states, "velocity_update", counted)

    def predict(self, x: Tensor, t: float) -> Tensor:
        return velocity(x, t)

    def predict_and_move(self, x: Tensor, t: float, move: Move) -> tuple[Tensor, Tensor]:
        self.calls += 1
        assert len(move.velocities) == len(move.weights) <= MAX_VELOCITIES
        moved = super().predict_and_move(x, t, move)
        self.apart -= 1
        return moved


@pytest.mark.parametrize(
    "text, calls, apart",
    # U adds from its third step on what one kernel can't take; the last step is Euler's.
    [("D9", 9, 0), ("X9", 17, 0), ("U9", 9, 6), ("U2", 2, 0), ("A3U3", 6, 1), ("H1D4X2U2", 12, 0)],
)
def test_how_many_operations_a_plan_makes(text, calls, apart, monkeypatch):
    plan, state = Plan.parse(text), State(noise(0))
    field = Fusing(monkeypatch)
    for step, t0, t1 in plan.schedule():
        state = step(field, state, t0, t1)
    assert (field.calls, field.apart) == (calls, apart)
    assert plan.cost.predictor == calls


@pytest.mark.parametrize("letter", "UDXEH")
def test_a_state_holds_no_more_than_it_says(letter):
    state = State(noise(0))
    for step, t0, t1 in Plan.parse(f"{letter}40").schedule():
        state = step(Function(velocity), state, t0, t1)
        kept = [point.x is not None for point in state.past]
        assert len(kept) <= MAX_PAST
        assert kept == [False] * (len(kept) - KEPT_STATES) + [True] * min(KEPT_STATES, len(kept))


def test_a_plan_that_starts_later_is_diffusers_on_that_part():
    pytest.importorskip("diffusers")
    x = noise(4)
    for letter in "UD":
        later = Plan.parse(f"{letter}6", shift=2.0).starting_at(0.35)
        scheduler = scheduler_of(letter)
        scheduler.set_timesteps(6)
        scheduler.sigmas = 1 - torch.tensor(later.grid, dtype=torch.float64)
        loop = dpm_without_rounding if letter == "D" else by_diffusers
        assert_close(run(later, velocity, x), loop(scheduler, velocity, x), 1e-13)


PLANS = ["U5", "D5", "X3", "H1U2P1D2A1X2U1"]


@pytest.mark.parametrize("plan", PLANS)
def test_samples_are_the_steps_on_the_model(plan):
    """Under guidance of three of four channels, with the guidance switched off at the ends."""
    model = tiny_model(refiner=False, dtype=torch.float64)
    plan = Plan.parse(plan, guidance_interval=(0.2, 0.8))
    x, labels = rng.noise(model.latent_shape, 3, range(3)).double(), torch.tensor(LABELS)
    field = GuidedField(model, plan, labels, 1.7, 3)
    got = ft.sample(model, plan, labels, noise=x, guidance=1.7)
    if "P" not in plan.letters:
        assert_close(got, written_out(plan.letters, plan.grid, field.predict, x), 1e-10)
    assert_close(got, run(plan, field.predict, x), 1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_captured_and_in_half_precision(plan):
    model, recorder = captured_model()
    expected = plain(plan, LABELS, seed=0, guidance=1.5)
    for _ in range(3):
        assert ft.sample(model, plan, LABELS, seed=0, guidance=1.5).equal(expected)
    assert recorder.recorded == 1
    half = ft.sample(tiny_model(dtype=torch.bfloat16), plan, LABELS, seed=0, guidance=1.5)
    assert_close(half, expected, 5e-2)


@pytest.mark.parametrize("plan", ["U6", "D6", "X3"])
def test_an_edit_keeps_what_is_masked(plan):
    model = tiny_model(refiner=False)
    source = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(model.latent_shape[1:], dtype=torch.bool)
    mask[:4] = True
    edited = ft.inpaint(model, plan, source, mask, LABELS, seed=1, output="latents")
    assert_close(edited[..., 4:, :], source[..., 4:, :], 1e-6)
    assert relative_error(edited[..., :4, :], source[..., :4, :]) > 0.1
    whole = ft.edit(model, plan, source, LABELS, strength=0.6, seed=1, output="latents")
    fine = ft.edit(model, "H64", source, LABELS, strength=0.6, seed=1, output="latents")
    assert_close(whole, fine, 0.05)
