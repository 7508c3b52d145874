"""What a further call in a fitted plan promises, without a fit."""

from __future__ import annotations

import torch

from ..solver.plan import Plan
from .fit import Advance, Batch, _derivatives, _states, inserted


@torch.no_grad()
def foreseen_errors(plan: Plan, batch: Batch, letter: str, advance: Advance) -> list[float]:
    """The error that a call before step 1, 2, ..., len(plan) promises, to first order.

    The last is after the last step. A new call changes nothing as long as its weights are zero, so
    the derivatives by all that there is are those of `plan`. Besides them only those by the weights
    of the new velocity are computed, of all places together fewer than those of `plan`.
    """
    residual = (batch.fine - _states(plan, batch)[-1].x).flatten().double()
    known = torch.stack(_derivatives(plan, batch, _states(plan, batch), advance)).flatten(1)
    errors = []
    for at in range(1, len(plan) + 1):
        longer = inserted(plan, at, letter)
        new = _derivatives(
            longer,
            batch,
            _states(longer, batch),
            advance,
            lambda step, k, at=at: k is not None and k == step - at,  # type: ignore[misc]
        )
        J = torch.cat([known, torch.stack(new).flatten(1)]).double()
        curvature = J @ J.T
        curvature += 1e-4 * curvature.diagonal().clamp(min=1e-12).diag()
        change = torch.linalg.solve(curvature, J @ residual)
        errors.append(float((residual - change @ J).square().mean().sqrt()))
    return errors
