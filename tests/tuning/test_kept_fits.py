"""Fits that go on where they were killed, and what a further call promises."""

from __future__ import annotations

import pytest
import torch
from mixture import CALIBRATION

from flowturbo import Plan
from flowturbo.tuning import fit
from flowturbo.tuning.fit import Batch
from flowturbo.tuning.foreseen import foreseen_errors

PARTS = [
    Batch(CALIBRATION.field, CALIBRATION.noise[rows], CALIBRATION.fine[rows])
    for rows in (slice(0, 50), slice(50, 128))
]


class Killed(Exception):
    pass


def start(steps: int) -> Plan:
    return fit.weighted(Plan.parse(f"L{steps}"), 2)


def test_a_killed_fit_goes_on_after_its_last_iteration_and_ends_at_the_same_plan():
    kept: dict[str, object] = {}

    def keep(name, make):
        if name not in kept:
            kept[name] = make()
        return kept[name]

    whole = fit.fit_weights(start(3), PARTS, iterations=3, least_gain=0, keep=keep)
    assert len(kept) == 4
    for name in list(kept)[1:]:
        del kept[name]
    asked = []

    def killed(name, make):
        asked.append(name)
        if len(asked) == 4:
            raise Killed
        return keep(name, make)

    with pytest.raises(Killed):
        fit.fit_weights(start(3), PARTS, iterations=3, least_gain=0, keep=killed)
    assert len(kept) == 3
    assert fit.fit_weights(start(3), PARTS, iterations=3, least_gain=0, keep=keep) == whole


def test_what_a_further_call_promises_is_the_least_squares_of_all_derivatives():
    """Against the derivatives of the longer plan by all its weights, as `fit` takes them."""
    plan = fit.fit_weights(start(3), PARTS[:1], iterations=3)
    foreseen = foreseen_errors(plan, PARTS[0], "M", lambda calls: None)
    assert len(foreseen) == 3
    error = fit.rms_error(plan, PARTS[:1])
    for at, promised in enumerate(foreseen, 1):
        longer = fit.inserted(plan, at, "M")
        states = fit._states(longer, PARTS[0])
        J = torch.stack(fit._derivatives(longer, PARTS[0], states, lambda calls: None))
        J = J.flatten(1).double()
        residual = (PARTS[0].fine - states[-1].x).flatten().double()
        _, sizes, directions = torch.linalg.svd(J, full_matrices=False)
        directions = directions[sizes > 1e-9 * sizes[0]]
        best = float((residual - (directions @ residual) @ directions).square().mean().sqrt())
        assert best <= promised * (1 + 1e-9)
        assert promised - best < 0.1 * (error - best)
