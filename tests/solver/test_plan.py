"""Plans: text and back, grids, cost, and refusals that show the place."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowturbo import Plan
from flowturbo.solver.plan import MAX_STEPS, shifted_grid
from flowturbo.solver.steps import STEPS

runs = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(1, 9)), min_size=1, max_size=8
)


def normal_form(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [
        (letter, sum(n for _, n in group))
        for letter, group in itertools.groupby(parts, key=lambda part: part[0])
    ]


@given(runs)
def test_text_and_back(parts):
    parts = [("H", 1), *parts]
    text = "".join(f"{letter}{n}" for letter, n in normal_form(parts))
    plan = Plan.parse(text)
    assert str(plan) == text
    assert plan.letters == "".join(letter * n for letter, n in parts)
    assert Plan.parse(str(plan)) == plan
    assert hash(Plan.parse(text)) == hash(plan)
    assert [step.letter for step, _, _ in plan.schedule()] == list(plan.letters)
    assert len(plan) == len(plan.letters)


@given(st.text(alphabet="HPREABCSUDX0123456789hpx -\n", max_size=12))
def test_any_text_is_a_plan_or_refused_in_words(text):
    try:
        plan = Plan.parse(text)
    except ValueError as error:
        said = str(error)
    else:
        assert Plan.parse(str(plan)) == plan
        return
    assert "^" in said.split("\n")[-1] or "empty string" in said


@pytest.mark.parametrize(
    "text, place, said",
    [
        ("H1p3", 2, "'p'"),
        ("1H", 0, "'1'"),
        ("H1 P5", 2, "' '"),
        ("H0", 1, "a count must be from 1"),
        ("H01", 1, "a count must be from 1"),
        ("H1P5R3!", 6, "'!'"),
        ("H1Q2", 2, "'Q'"),
        ("H99999", 1, "a count must be from 1"),
        ("H600P600", 5, "1 to 1000 steps"),
        ("R3H1", 0, "R needs the velocity of an earlier step"),
        ("S1", 0, "S needs the velocity of an earlier step"),
        ("H٣", 1, "'٣'"),
    ],
)
def test_nonsense_is_refused_and_the_place_shown(text, place, said):
    with pytest.raises(ValueError, match=r"\^$") as error:
        Plan.parse(text)
    message, shown, mark = str(error.value).split("\n")
    assert said in message
    assert mark.index("^") - 2 == place
    assert shown[2:] == (text if said[0] not in "RS" else Plan.parse("E1" + text).letters[1:])


@pytest.mark.parametrize("text", [None, 3, b"H1", ["H"]])
def test_a_plan_is_text(text):
    with pytest.raises(TypeError, match="plan must be a string"):
        Plan.parse(text)
    with pytest.raises(ValueError, match="empty string"):
        Plan.parse("")


@pytest.mark.parametrize(
    "text, predictor, refiner",
    [
        ("H1P5R3", 7, 6),
        ("H8P9R5", 25, 10),
        ("H2P4R2", 8, 4),
        ("H5P7R3", 17, 6),
        ("P3", 4, 0),  # the first has no cached velocity
        ("E1P1", 3, 0),  # Euler leaves a velocity of the past, not of the present
        ("E4", 4, 0),
        ("A3B3C3", 9, 0),
        ("H1S2", 2, 2),
        ("E1R2P2", 3, 4),  # R leaves a velocity for P
    ],
)
def test_cost(text, predictor, refiner):
    assert Plan.parse(text).cost[:2] == (predictor, refiner)


def test_cost_counts_guided_calls_of_the_closed_interval():
    plan = Plan.parse("H4", guidance_interval=(0.25, 0.5))  # calls at 0 .25, .25 .5, .5 .75, .75 1
    assert plan.cost.guided_predictor == 4
    assert Plan.parse("H4").cost.guided_predictor == 8
    assert Plan.parse("H1R1", guidance_interval=(0.0, 0.5)).cost[2:] == (2, 1)


def test_uniform_and_shifted_grids():
    assert Plan.parse("H4").grid == (0.0, 0.25, 0.5, 0.75, 1.0)
    # SD3: noise level s' = 3 s / (1 + 2 s); s = 0.5 becomes 0.75, so t = 0.25.
    assert Plan.parse("H2", shift=3.0).grid == pytest.approx((0.0, 0.25, 1.0), abs=1e-15)
    assert Plan.parse("E3", grid=[0, 0.1, 0.7, 1]).grid == (0.0, 0.1, 0.7, 1.0)


@given(st.integers(1, 60), st.floats(0.05, 20))
def test_every_shifted_grid_rises_from_0_to_1(steps, shift):
    grid = shifted_grid(steps, shift)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(grid))
    assert Plan("E" * steps, grid).grid == grid


@pytest.mark.parametrize(
    "grid, said",
    [
        ((0, 0.5, 0.5, 1), "grid[1] = 0.5 is followed by grid[2] = 0.5"),
        ((0, 0.6, 0.5, 1), "grid[1] = 0.6 is followed by grid[2] = 0.5"),
        ((0, 0.5, 1), "grid must hold 4 times"),
        ((0, 0.3, math.nan, 1), "grid[1] = 0.3"),
        ((0.1, 0.3, 0.5, 1), "grid must run from 0 to 1"),
        ((0, 0.3, 0.5, 0.9), "grid must run from 0 to 1"),
        ((0, 0.3, 0.5, math.inf), "grid must run from 0 to 1"),
    ],
)
def test_grids_that_do_not_rise_from_0_to_1_are_refused(grid, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Plan.parse("E3", grid=grid)


@pytest.mark.parametrize(
    "shift, said",
    [(0, "positive, got 0"), (-1, "positive"), (math.nan, "finite"), (math.inf, "finite")],
)
def test_bad_shifts_are_refused(shift, said):
    with pytest.raises(ValueError, match=f"shift must be {said}"):
        Plan.parse("H2", shift=shift)


@pytest.mark.parametrize(
    "value", [3, True, "01", [0, None, 1], [[0, 0.5, 1]], [0, "0.5", 1], [0, True]]
)
def test_what_is_no_list_of_numbers_is_refused_by_name(value):
    with pytest.raises(TypeError, match="grid must be a list of numbers"):
        Plan.parse("H2", grid=value)
    with pytest.raises(TypeError, match="guidance_interval must be a list of numbers"):
        Plan.parse("H2", guidance_interval=value)
    with pytest.raises(TypeError, match="shift must be a number"):
        Plan.parse("H2", shift="3")
    with pytest.raises(TypeError, match="letters must be a string"):
        Plan(None, (0, 1))


def test_numpy_numbers_are_numbers():
    plan = Plan.parse(
        "H2", grid=np.linspace(0, 1, 3, dtype=np.float32), guidance_interval=np.array([0.5, 1])
    )
    assert plan == Plan.parse("H2", guidance_interval=(0.5, 1))
    assert Plan.parse("H2", shift=np.float32(3)) == Plan.parse("H2", shift=3)


def test_other_refusals():
    with pytest.raises(ValueError, match="give grid or shift, not both"):
        Plan.parse("H2", grid=(0, 0.5, 1), shift=3.0)
    for interval in ((0.5, 0.4), (-0.1, 1), (0, 1.1), (math.nan, 1), (0.1,)):
        with pytest.raises(ValueError, match="guidance_interval"):
            Plan.parse("H2", guidance_interval=interval)
    with pytest.raises(ValueError, match="no step is called 'Z'"):
        Plan("HZ", (0, 0.5, 1))
    with pytest.raises(ValueError, match=f"1 to {MAX_STEPS} steps"):
        Plan("", (0,))


def test_a_plan_is_a_frozen_value():
    plan = Plan.parse("H1P5R3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.letters = "E"
    assert plan != Plan.parse("H1P5R3", shift=2.0)
    assert plan != Plan.parse("H1P5R3", guidance_interval=(0.1, 1.0))
    assert {plan: 1}[Plan.parse("HPPPPPRRR")] == 1
