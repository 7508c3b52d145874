"""The fit of a plan's times and weights."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from close import assert_close
from mixture import CALIBRATION, FIELD, TEST, random_plan, run
from paths import ROOT
from torch import Tensor

from flowturbo import Plan
from flowturbo.tuning import fit
from flowturbo.tuning.fit import Batch

sys.path.insert(0, str(ROOT / "bench"))


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_fitted_plan_beats_adams_bashforth_on_noise_it_never_saw(steps):
    plan = fit.fit_weights(fit.weighted(Plan.parse(f"L{steps}"), 2), [CALIBRATION])
    published = [fit.rms_error(Plan.parse(f"{letter}{steps}"), [TEST]) for letter in "EABC"]
    assert fit.rms_error(plan, [TEST]) < 0.75 * min(published)


def test_times_alone_are_fitted_for_steps_without_weights():
    plan = fit.fit_weights(Plan.parse("H1P2"), [CALIBRATION])
    assert plan.letters == "HPP"
    assert not plan.weights
    assert fit.rms_error(plan, [TEST]) < 0.95 * fit.rms_error(Plan.parse("H1P2"), [TEST])


@pytest.mark.parametrize(
    "plan", [Plan.parse("H1P1"), fit.weighted(Plan.parse("L3"), 3), random_plan("LML", 1)]
)
def test_a_fit_never_gets_worse_and_keeps_letters_cost_and_order_of_times(plan):
    fitted = fit.fit_weights(plan, [CALIBRATION], iterations=3)
    assert fit.rms_error(fitted, [CALIBRATION]) <= fit.rms_error(plan, [CALIBRATION])
    assert (fitted.letters, fitted.cost) == (plan.letters, plan.cost)
    assert all(a < b for a, b in itertools.pairwise(fitted.grid))


def test_derivatives_are_those_of_autograd():
    """By each inner time and weight of L steps written out in torch."""
    plan = fit.fit_weights(fit.weighted(Plan.parse("L4"), 2), [CALIBRATION], iterations=1)

    def end(times: Tensor, *rows: Tensor) -> Tensor:
        x, velocities = CALIBRATION.noise[:7], []
        for t, row in zip([torch.zeros(()), *times], rows, strict=True):
            velocities.insert(0, FIELD.predict(x, t))
            x = x + sum(w * v for w, v in zip(row, velocities, strict=True))
        return x

    rows = [torch.tensor(row).double() for row in plan.weights]
    expected = torch.autograd.functional.jacobian(
        end, (torch.tensor(plan.grid[1:-1]).double(), *rows)
    )
    batch = Batch(CALIBRATION.field, CALIBRATION.noise[:7], CALIBRATION.fine[:7])
    states = fit._states(plan, batch)
    derivatives = torch.stack(fit._derivatives(plan, batch, states, lambda calls: None), dim=-1)
    assert_close(derivatives, torch.cat([e.double() for e in expected], dim=-1), 0.02)


def test_a_call_that_was_inserted_changes_nothing_until_it_is_fitted():
    plan = fit.fit_weights(fit.weighted(Plan.parse("L3"), 2), [CALIBRATION], iterations=2)
    for at, letter in itertools.product(range(1, 4), "LM"):
        longer = fit.inserted(plan, at, letter)
        assert len(longer) == 4
        assert longer.letters[at] == letter
        assert_close(run(longer, FIELD, TEST.noise), run(plan, FIELD, TEST.noise), 1e-14)
        assert fit.rms_error(
            fit.fit_weights(longer, [CALIBRATION], iterations=2), [CALIBRATION]
        ) < fit.rms_error(plan, [CALIBRATION])


def test_a_plan_that_diverges_has_an_infinite_error():
    assert fit.rms_error(Plan("LL", (0, 0.5, 1), weights=((1e200,), (1e200, 0))), [TEST]) == float(
        "inf"
    )
