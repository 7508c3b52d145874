"""Plans with stages: their text, their files, their noise levels and their price."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowturbo as ft
from flowturbo.solver.plan import as_plan
from flowturbo.solver.stages import Stage, StagedPlan, as_stages, matched_level
from flowturbo.tuning.cost import CostModel

TEXTS = [
    "A4 at 1/2 + A3 from 0.6",
    "A12 at 1/2 to 0 + E1 from 0.12",
    "A3 at 1/4 + A3 at 1/2 from 0.8 + H1P2E1 from 0.5",
    "A2 at 3/4 + B1 from 1e-05",
    "A2 to 0.25 + B1 from 0.3",
    "A7",
]


@pytest.mark.parametrize("text", TEXTS)
def test_stages_are_read_as_they_are_written(text, tmp_path):
    plan = StagedPlan.parse(text)
    assert str(plan) == text
    assert StagedPlan.parse(text.replace(" + ", "+").replace(" ", "  ")) == plan
    plan.save(tmp_path / "plan.json", {"by": "hand"})
    assert StagedPlan.load(tmp_path / "plan.json") == plan
    assert hash(StagedPlan.parse(text)) == hash(plan)


def test_other_spellings():
    plan = StagedPlan.parse("AA from 1 at 0.50 + E from .3 at 2/2")
    assert plan == StagedPlan((Stage("A2", 0.5), Stage("E1", "1", 0.3)))
    assert [stage.size for stage in plan.stages] == [Fraction(1, 2), 1]
    assert Stage("A2", 0.1).size == Fraction(1, 10)


@given(
    st.lists(st.sampled_from([0.2, 0.25, 0.5, 0.7, 1.0]), max_size=3),
    st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3),
    st.lists(st.none() | st.floats(0, 0.99), min_size=3, max_size=3),
)
def test_text_and_back_is_the_same_plan(sizes, starts, ends):
    try:
        stages = [
            Stage(f"E{number + 1}", size, starts[number - 1] if number else 1.0, ends[number])
            for number, size in enumerate(sorted(sizes))
        ]
        plan = StagedPlan((*stages, Stage("A2", 1, starts[-1] if sizes else 1.0)))
    except ValueError:
        return
    assert StagedPlan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    "text, message, column",
    [
        ("", "must look like 'A4 at 1/2 + A3 from 0.6': here a plan is due", 0),
        ("A4 at 1/2 + ", "here a plan is due", 12),
        ("A4 at 1/2 + + A3", "here a plan is due", 12),
        ("A4 at 1/2 + Z3 from 0.6", "got 'Z'", 12),
        ("A4 at 1/2 + A0 from 0.6", "a count must be from 1 to 1000, got 0", 13),
        ("A4 at", "after 'at' comes a size such as 1/2, got ''", 5),
        ("A4 at 1/0 + A3", "after 'at' comes a size such as 1/2, got '1/0'", 6),
        ("A4 at half + A3", "after 'at' comes a size such as 1/2, got 'half'", 6),
        ("A4 from 1/2 + A3", "after 'from' comes a noise level such as 0.6, got '1/2'", 8),
        ("A4 of 1/2 + A3", "after a plan come at, from, to or +, got 'of'", 3),
        ("A4 A3 at 1", "after a plan come at, from, to or +, got 'A3'", 3),
        ("A4 at 1/2 at 1/2 + A3", "after a plan come from, to or +, got 'at'", 10),
        ("A4 at 2 + A3 from 0.6", "size must be above 0 and at most 1, got 2", 0),
        ("A4 at 0 + A3 from 0.6", "size must be above 0 and at most 1, got 0", 0),
        ("A4 at 1/2 + A3 from 1.5", "start must be above 0 and at most 1, got 1.5", 12),
        ("A4 at 1/2 + A3 from 0.6 to 0.6", "end must be at least 0 and below start, 0.6", 12),
    ],
)
def test_a_mark_stands_under_what_is_wrong(text, message, column):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        StagedPlan.parse(text)
    said, shown, mark = str(error.value).split("\n")[-3:]
    assert message in said
    assert (shown, mark) == (f"  {text}", f"  {' ' * column}^")


@pytest.mark.parametrize(
    "text, message",
    [
        ("A4 at 1/2 + A3", "stage 2 must say from which noise level below 1 it takes over"),
        ("A4 from 0.5 + A3 from 0.2", "the first stage must start at noise level 1, got 0.5"),
        ("A4 at 1/2", "the last stage must have size 1, got 1/2"),
        ("A4 at 1/2 + A3 from 0.6 to 0.1", "the last stage must end at noise level 0, got 0.1"),
        (
            "A4 at 1/2 + A3 at 1/4 from 0.6 + A2 from 0.3",
            "stage 2 must not be smaller than the one before it, 1/2, got size 1/4",
        ),
        (
            "A4 at 1/2 to 0.5 + A3 from 0.6",
            "stage 1 must go to noise level 0.4286 or lower, which matches 0.6 at 2 times its "
            "size, got 0.5",
        ),
        (
            "A4 at 1/2 + A3 at 1/2 from 0.3 + A2 from 0.9",
            "stage 2 must end below the noise level at which it starts, 0.3, got 0.8182",
        ),
        ("R4 at 1/2 + A3 from 0.6", "R needs the velocity of an earlier step"),
    ],
)
def test_stages_that_do_not_follow_each_other(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StagedPlan.parse(text)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Stage("A4", "a half"), "size must look like '1/2' or '0.5', got 'a half'"),
        (lambda: Stage("A4", float("nan")), "size must be finite, got nan"),
        (lambda: Stage("A4", [1]), r"size must be a number, got \[1\]"),
        (lambda: Stage("A4", start=True), "start must be a number, got True"),
        (lambda: Stage(ft.Plan.parse("A4").starting_at(0.5)), "plan must start at 0, got one"),
        (lambda: Stage(ft.Plan.parse("A4").between(0, 0.5)), "plan must end at 1, got one that"),
        (lambda: StagedPlan(()), "stages must be 1 to 16 of Stage"),
        (lambda: StagedPlan(("A4",)), "stages must be 1 to 16 of Stage"),
    ],
)
def test_values_that_make_no_stage(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        wrong()


@pytest.mark.parametrize("level", [0.9, 0.5, 0.12])
@pytest.mark.parametrize("ratio", [1, 4 / 3, 2, 4])
def test_matched_levels_have_the_same_ratio_of_signal_to_noise(level, ratio):
    """Where ratio squared values are averaged, noise falls by the ratio, and the picture stays."""
    small = matched_level(level, ratio)
    assert (1 - small) / small == pytest.approx(ratio * (1 - level) / level)
    assert matched_level(small, 1 / ratio) == pytest.approx(level)


def test_levels_of_stages():
    plan = StagedPlan.parse("A3 at 1/4 + A3 at 1/2 from 0.8 to 0.1 + E1 from 0.5")
    assert plan.levels([8, 16, 32]) == [(1.0, matched_level(0.8, 2)), (0.8, 0.1), (0.5, 0.0)]
    # Rounded to what a network takes, the sides are not quite of that ratio.
    assert plan.levels([9, 16, 32])[0] == (1.0, matched_level(0.8, 16 / 9))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.7])
def test_a_stage_walks_its_part_of_the_plan_that_the_shift_gives(shift):
    """In steps that are equal before the shift, as those of `Plan.parse`."""
    whole = ft.Plan.parse("A8", shift=shift)
    assert Stage("A8").between(1, 0, shift) == whole
    part = Stage("A4").between(1 - whole.grid[2], 1 - whole.grid[6], shift)
    assert part.letters == "AAAA"
    assert part.grid == pytest.approx(whole.grid[2:7])
    assert (part.start, part.end) == (part.grid[0], part.grid[-1])
    assert (part.start, part.end) == pytest.approx((whole.grid[2], whole.grid[6]))


def test_the_grid_and_weights_of_a_plan_are_compressed_into_its_stage():
    fitted = ft.Plan("LE", (0.0, 0.25, 1.0), weights=((0.25,),))
    part = Stage(fitted).between(0.8, 0.3, shift=3.0)
    assert part.grid == pytest.approx((0.2, 0.325, 0.7))
    assert part.weights[0] == pytest.approx((0.125,))
    assert Stage(fitted).between(1, 0, 3.0) is fitted


def test_files_hold_the_grids_of_plans(tmp_path):
    fitted = ft.Plan("LE", (0.0, 0.25, 1.0), (0.1, 0.9), weights=((0.25,),))
    plan = StagedPlan((Stage(fitted, "1/3"), Stage("A2", start=0.4)))
    path = tmp_path / "stages.json"
    plan.save(path)
    assert as_stages(str(path)) == plan
    fitted.save(tmp_path / "fitted.json")
    assert StagedPlan((Stage(str(tmp_path / "fitted.json"), "1/3"), plan.stages[1])) == plan
    with pytest.raises(ValueError, match=r"path must end in \.json"):
        plan.save(tmp_path / "stages.txt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e | {"format": "flowturbo stages 2"}, "its format must be"),
        (lambda e: e | {"stages": []}, "stages must be 1 to 16 of Stage"),
        (lambda e: e | {"stages": "A4"}, "stages must be a list, got str"),
        (lambda e: e | {"more": 1}, "it must hold format, stages, about, and holds 'format'"),
        (lambda e: e | {"stages": ["A4"]}, "it must hold plan, size, start, end, and holds 'A4'"),
        (lambda e: e | {"stages": [{**e["stages"][0], "size": 1}]}, "size must be a str, got int"),
        (lambda e: e | {"stages": [{**e["stages"][0], "plan": "A0"}]}, "a count must be from 1"),
    ],
)
def test_files_that_hold_no_stages(tmp_path, change, message):
    path = tmp_path / "stages.json"
    StagedPlan.parse(TEXTS[0]).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"{path.name} is no .*{message}"):
        as_stages(str(path))
    with pytest.raises(ValueError, match="can't be read"):
        StagedPlan.load(tmp_path / "absent.json")


def test_stages_are_taken_where_they_make_sense_and_refused_elsewhere(tmp_path):
    path = tmp_path / "stages.json"
    StagedPlan.parse(TEXTS[0]).save(path)
    assert as_stages(TEXTS[0]) == as_stages(str(path)) == StagedPlan.parse(TEXTS[0])
    assert as_stages("A7 at 1", 3.0) == as_stages(StagedPlan.parse("A7"), 3.0)
    assert as_stages("A7", 3.0) == ft.Plan.parse("A7", shift=3.0)
    for plan in (TEXTS[0], StagedPlan.parse(TEXTS[0]), str(path)):
        with pytest.raises(ValueError, match="stages: sample, compile and sample_stages take such"):
            as_plan(plan)
    with pytest.raises(TypeError, match="plan must be a string"):
        as_stages(3)


def test_a_plan_between_two_times():
    plan = ft.Plan.parse("A3")
    assert plan.between(0, 1) == plan
    assert plan.between(0.5, 1) == plan.starting_at(0.5)
    again = plan.between(0.2, 0.5).between(0.5, 1)
    assert again.grid == pytest.approx(plan.starting_at(0.5).grid)
    assert plan.between(0.2, 0.5) != plan.between(0.2, 0.6)
    for start, end in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5, math.nan)):
        with pytest.raises(ValueError, match=r"start and end must be|end must be finite"):
            plan.between(start, end)
    with pytest.raises(ValueError, match="a plan must end at 1 to be saved"):
        plan.between(0, 0.5).save("plan.json")
    with pytest.raises(ValueError, match=r"end must be above 0\.5 and at most 1, got 0\.2"):
        ft.Plan("E", (0.5, 0.7), start=0.5, end=0.2)
    with pytest.raises(
        ValueError, match=r"grid must run from 0 to 1, got grid\[0\] = 0.0 and grid"
    ):
        ft.Plan("E", (0.0, 0.7))


def test_the_price_is_calls_times_tokens():
    plan = StagedPlan.parse("A4 at 1/2 + H1P1 at 3/4 from 0.8 + A3 from 0.5")
    assert plan.price == 4 / 4 + 3 * 9 / 16 + 3
    assert StagedPlan.parse("A7").price == ft.Plan.parse("A7").cost.predictor
    assert plan.cost == (10, 0, 10, 0)
    assert len(plan) == 9


def test_the_search_prices_stages_by_the_same_rule():
    steps = {"A": 1.0, "E": 1.0, "H": 2.0, "R": 0.2, "X": 2.0}
    cost_model = CostModel(steps, budget=4.0, fixed=0.5)
    plan = StagedPlan.parse("A4 at 1/2 + A2 from 0.5")
    assert cost_model.of(plan) == 0.5 + 4 / 4 + 2
    assert cost_model.allows(plan)
    assert not cost_model.allows(StagedPlan.parse("A4 at 1/2 + A3 from 0.5"))
    refined = StagedPlan.parse("A4 at 1/2 + H1R1 from 0.5")
    assert cost_model.of(refined) == pytest.approx(0.5 + 1 + 2.2)
    # A step of two calls makes one where it ends at t = 1, which only the last stage does.
    two = StagedPlan.parse("X2 at 1/2 + X2 from 0.5")
    assert (two.cost.predictor, two.price) == (4 + 3, 4 / 4 + 3)
    assert cost_model.of(two) == 0.5 + two.price
    done = StagedPlan.parse("X2 at 1/2 to 0 + X2 from 0.5")
    assert (done.cost.predictor, cost_model.of(done)) == (3 + 3, 0.5 + 3 / 4 + 3)
    assert cost_model.of(StagedPlan.parse("A3")) == cost_model.of(ft.Plan.parse("A3"))
