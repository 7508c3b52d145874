"""An exact velocity field, a mixture of normal distributions, and plans that are fitted on it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from flowturbo import Plan
from flowturbo.runtime import rng
from flowturbo.solver.steps import (
    Field,
    State,
)
from flowturbo.tuning.fit import Batch


class Mixture(Field):
    """The exact velocity from normal noise (t = 0) to a mixture of normal distributions of this
    width; an exact refiner.
    """

    def __init__(self, centres: Tensor, width: float) -> None:
        self.centres, self.width = centres, width

    def predict(self, x: Tensor, t: float) -> Tensor:
        away = x[:, None] - t * self.centres
        variance = (1 - t) ** 2 + (t * self.width) ** 2
        share = torch.softmax(-away.square().sum(dim=-1) / (2 * variance), dim=1)
        toward = self.centres + (t * self.width**2 - (1 - t)) / variance * away
        return (share[..., None] * toward).sum(dim=1)

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        return self.predict(x, t) - v


FIELD = Mixture(
    torch.tensor(
        [[2.0, 0.5, -1.0], [-1.5, 1.0, 1.0], [0.3, -2.0, 0.4], [-0.5, -0.5, 2.0]]
    ).double(),
    0.6,
)


def run(plan: Plan, field: Field, x: Tensor) -> Tensor:
    state = State(x)
    for step, t0, t1 in plan.schedule():
        state = step(field, state, t0, t1)
    return state.x


def images(seed: int, count: int) -> Batch:
    noise = rng.noise((3,), seed, range(count)).double()
    return Batch(lambda plan: FIELD, noise, run(Plan.parse("C300"), FIELD, noise))


CALIBRATION, TEST = images(1, 128), images(2, 512)
some_weights = st.floats(-2, 2, allow_nan=False)


def random_plan(letters: str, seed: int) -> Plan:
    """A plan whose fitted steps use every velocity there is, by random weights."""
    generator = np.random.default_rng(seed)
    grid = (0.0, *np.sort(generator.uniform(0.05, 0.95, len(letters) - 1)).tolist(), 1.0)
    return Plan(
        letters,
        grid,
        weights=tuple(tuple(generator.normal(0, 0.3, i + 1).tolist()) for i in range(len(letters))),
    )
