"""Every kind of step converges with the order it claims, and calls the field as often as its plan's
cost says.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import heun_step, pseudo_corrector_step, refiner_step
from torch import Tensor

from flowturbo import Plan
from flowturbo.solver.steps import STEPS, Field, PastVelocity, State, adams_bashforth_weights


class Ode(Field):
    """dx/dt = f(x, t) as a field; its refiner is exact: the offset from any velocity to f."""

    def __init__(self, f) -> None:
        self.f, self.calls = f, []

    def predict(self, x: Tensor, t: float) -> Tensor:
        self.calls.append(("predict", t))
        return self.f(x, t)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        self.calls.append(("refine", t))
        return self.f(x, t) - v


def solve(ode: Ode, plan: Plan, x0: Tensor) -> Tensor:
    state = State(x0)
    for step, t0, t1 in plan.schedule():
        state = step(ode, state, t0, t1)
    return state.x


def double(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# name: (f, its solution x(t))
ODES = {
    "nonlinear": (lambda x, t: x * (1 - x), lambda t: double(1 / (1 + 4 * math.exp(-t)))),
    "rotating": (
        lambda x, t: 2 * torch.stack([-x[:, 1], x[:, 0]], dim=1),
        lambda t: double(math.cos(2 * t), math.sin(2 * t)),
    ),
    "in time": (
        lambda x, t: math.sin(3 * t) - x,
        lambda t: double(0.8 * math.exp(-t) + (math.sin(3 * t) - 3 * math.cos(3 * t)) / 10),
    ),
}


def measured_order(
    letters, name: str, shift: float, counts, known: int = 0, ends=(0.0, 1.0)
) -> float:
    """The slope of log error over log step size. letters: number of steps -> the plan's letters;
    the first `known` grid times are not stepped over: their exact states and velocities are the
    past that the first step finds. ends: where the grid starts and ends."""
    f, exact = ODES[name]
    errors = []
    for n in counts:
        plan = Plan(letters(n), Plan.parse(f"E{n}", shift=shift).grid)
        grid = [ends[0] + (ends[1] - ends[0]) * t for t in plan.grid]
        past = tuple(PastVelocity(t, f(exact(t), t), exact(t)) for t in grid[:known])
        state = State(exact(grid[known]), None, past)
        for step, t0, t1 in list(zip(plan.steps, grid, grid[1:], strict=False))[known:]:
            state = step(Ode(f), state, t0, t1)
        errors.append(float((state.x - exact(grid[-1])).norm()))
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ODES)
@pytest.mark.parametrize("letter", STEPS)
def test_order_of_convergence(letter, name, shift):
    claimed = STEPS[letter].order
    start = {"R": "H", "S": "H", "M": "LLL"}.get(letter, "")
    known = claimed - 1 if letter in "ABCLMD" else 1 if letter == "U" else 0
    # Exponential steps have their order where the log of the noise level is smooth.
    ends, counts = ((0.1, 0.9), (80, 160, 320)) if letter in "UDX" else ((0, 1), (40, 80, 160))
    order = measured_order(
        lambda n: start + letter * (n - len(start)), name, shift, counts, known, ends
    )
    assert claimed - 0.35 < order < claimed + 0.85, (
        f"{letter} on {name!r}: measured {order:.2f}, claimed {claimed}"
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("letter", "UDX")
def test_exponential_steps_converge_from_noise_to_data(letter, shift):
    """With order 2 up to a logarithm: near t = 0 and 1, steps in the log of t / (1 - t) stay as
    long as they are, however many there are."""
    order = measured_order(lambda n: letter * n, "rotating", shift, (160, 320, 640))
    assert 1.5 < order < 2.1


def test_the_pseudo_correctors_error_is_about_2_7_times_heuns():
    def error(letter: str) -> float:
        x = solve(
            Ode(lambda x, t: x), Plan.parse(f"{letter}200"), torch.ones(1, dtype=torch.float64)
        )
        return abs(float(x) - math.e)

    assert 2 < error("P") / error("H") < 3.5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_of_all_kinds_mixed_still_converge(shift):
    order = measured_order(lambda n: ("HAPABCP" * n)[:n], "nonlinear", shift, (70, 140, 280, 560))
    assert order > 1.7
    order = measured_order(
        lambda n: ("AUUXDHPDUU" * n)[:n], "rotating", shift, (80, 160, 320), ends=(0.1, 0.9)
    )
    assert order > 1.8


def test_adams_bashforth_weights_by_hand():
    assert adams_bashforth_weights([0.0], 0.0, 0.25) == [0.25]
    assert adams_bashforth_weights([0.0, 1.0], 1.0, 2.0) == [-0.5, 1.5]
    assert adams_bashforth_weights([0.0, 1.0, 2.0], 2.0, 3.0) == pytest.approx(
        [5 / 12, -16 / 12, 23 / 12], abs=1e-15
    )
    assert adams_bashforth_weights([0.0, 1.0, 2.0, 3.0], 3.0, 4.0) == pytest.approx(
        [-9 / 24, 37 / 24, -59 / 24, 55 / 24], abs=1e-15
    )


@given(
    st.lists(st.floats(0.02, 0.2), min_size=2, max_size=5),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_adams_bashforth_is_exact_on_polynomials_on_any_grid(gaps, coefficients):
    *times, t1 = np.cumsum([0.0, *gaps]).tolist()
    t0, polynomial = times[-1], np.polynomial.Polynomial(coefficients[: len(times)])
    integral = polynomial.integ()
    weights = adams_bashforth_weights(times, t0, t1)
    got = sum(w * polynomial(t) for w, t in zip(weights, times, strict=True))
    assert got == pytest.approx(integral(t1) - integral(t0), abs=1e-9)


@given(st.text(alphabet="".join(STEPS), min_size=0, max_size=12))
def test_a_plan_costs_what_it_calls(letters):
    plan = Plan.parse("H" + letters)
    ode = Ode(lambda x, t: torch.sin(x) + t)
    solve(ode, plan, torch.ones(2, dtype=torch.float64))
    kinds = [kind for kind, _ in ode.calls]
    assert (kinds.count("predict"), kinds.count("refine")) == plan.cost[:2]


def random_velocities(seed: int):
    """A velocity and a refiner of two rows for one row of x, as under guidance, both nonlinear."""
    mix = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def v(x: Tensor, t: float) -> Tensor:
        return torch.cat([torch.tanh(x @ mix[0] + t), torch.cos(x @ mix[1] - t)])

    def r(x: Tensor, t: float, velocity: Tensor) -> Tensor:
        return 0.3 * torch.sin(torch.cat([x, x]) @ mix[1] + velocity * t)

    return v, r


@pytest.mark.parametrize("seed", range(5))
def test_one_step_of_each_kind_is_the_independent_one(seed):
    v, r = random_velocities(seed)

    class Recording(Field):
        predict, refine = staticmethod(v), staticmethod(r)

    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(1, 3, dtype=torch.float64, generator=generator)
    cache = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    t0, t1 = 0.3, 0.45
    with_cache = State(x, cache, (PastVelocity(0.1, torch.full_like(cache, torch.nan)),))
    for letter, expected, state in (
        ("H", heun_step(v, x, t0, t1), with_cache),
        ("P", pseudo_corrector_step(v, x, t0, t1, cache), with_cache),
        ("P", pseudo_corrector_step(v, x, t0, t1, None), State(x)),
        ("R", refiner_step(r, x, t0, t1, cache), with_cache),
    ):
        after = STEPS[letter](Recording(), state, t0, t1)
        torch.testing.assert_close(after.x, expected[0], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(after.v, expected[1], rtol=1e-14, atol=1e-15)


def test_equation_7_reads_the_velocity_of_one_grid_time_before():
    v, r = random_velocities(0)

    class Recording(Field):
        predict, refine = staticmethod(v), staticmethod(r)

    x, before, stale = (
        torch.ones(1, 3).double(),
        torch.full((2, 3), 0.5).double(),
        torch.full((2, 3), torch.nan).double(),
    )
    after = STEPS["S"](Recording(), State(x, stale, (PastVelocity(0.2, before),)), 0.4, 0.6)
    refined = before + r(x, 0.4, before)
    torch.testing.assert_close(after.x, x + (0.6 - 0.4) * refined[:1])
    assert after.past[-1].t == 0.4
    torch.testing.assert_close(after.past[-1].v, refined)
    assert after.v is None
