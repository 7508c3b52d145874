"""Numbers that users pass, in any wrapping that has a clear meaning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowturbo.checks import numbers_of
from flowturbo.solver.plan import Plan

GRID = [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    "grid",
    [
        np.array(GRID),
        np.array(GRID, ">f4"),
        np.array(GRID[::-1])[::-1],
        torch.tensor(GRID),
        torch.tensor(GRID).half(),
        [torch.tensor(t) for t in GRID],
        [np.array(t) for t in GRID],
    ],
)
def test_lists_of_numbers_are_any_array(grid: object) -> None:
    got = numbers_of("grid", grid)  # type: ignore[arg-type]
    assert got == tuple(GRID)
    assert {type(number) for number in got} == {float}
    assert Plan.parse("H2", grid=grid) == Plan.parse("H2", grid=GRID)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "grid, said",
    [
        (np.array([True, False]), r"grid\[0\] = True"),
        (np.array([0, 1j]), r"grid\[0\] = 0j"),
        (np.array(["0"]), r"grid\[0\] = '?(np.str_)?"),
        (np.array([[0.0, 1.0]]), r"grid\[0\] = array"),
        ("0 1", "must be a list of numbers, got '0 1'"),
    ],
)
def test_what_holds_no_numbers_is_refused(grid: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        numbers_of("grid", grid)  # type: ignore[arg-type]
