"""The report of an evaluation: rivals, errors and verdicts."""

import numpy as np
import pytest
from PIL import Image
from quality_runs import read

import flowturbo as ft
from flowturbo.evaluation.quality import PLANS, plot_quality
from flowturbo.evaluation.quality_report import quality_table
from flowturbo.evaluation.statistics import family, jackknife_error, judge


@pytest.mark.parametrize(
    "plan, name",
    [
        ("E4", "Euler"),
        ("H2", "Heun"),
        ("P3", "pseudo corrector"),
        ("H1P3", "pseudo corrector"),
        ("B4", "Adams-Bashforth"),
        ("H1A3", "Adams-Bashforth"),
        ("H1U3", "UniPC"),
        ("A2D4", "DPM-Solver++"),
        ("X4", "RES"),
        ("X1A3", "RES"),
        ("U4R1", "exponential + refiner"),
        ("H1P3R2", "FlowTurbo"),
        ("H1S2", "FlowTurbo"),
        ("A3R1", "Adams-Bashforth + refiner"),
        ("E1R1", "Adams-Bashforth + refiner"),
    ],
)
def test_families(plan, name):
    assert family(ft.Plan.parse(plan)) == name


def test_default_plans_have_rivals_at_their_costs():
    plans = [ft.Plan.parse(plan) for plan in PLANS]
    assert len(set(plans)) == len(plans) == len({str(plan) for plan in plans})
    free = [plan.cost.predictor for plan in plans if not plan.cost.refiner]
    for plan in plans:
        if plan.cost.refiner:
            # A refiner call costs less than a sixth of a predictor call at 12 blocks, and no plan
            # here has more than ten.
            assert {plan.cost.predictor, plan.cost.predictor + 1} <= set(free), plan
            assert (
                sum(calls in (plan.cost.predictor, plan.cost.predictor + 1) for calls in free) >= 3
            ), plan


def row(
    plan: str,
    cost: float,
    rms: float,
    refiner_calls: int = 0,
    spread: float = 0.0,
    ms: float | None = None,
) -> dict:
    blocks = [rms + spread * (-1) ** i for i in range(10)]
    return {
        "plan": plan,
        "family": family(ft.Plan.parse(plan)),
        "predictor_calls": int(cost),
        "refiner_calls": refiner_calls,
        "cost": cost,
        "ms_per_image": cost if ms is None else ms,
        "rms": rms,
        "rms_blocks": blocks,
        "frechet": rms,
        "frechet_blocks": blocks,
        "frechet_first": rms,
        "label_share": 1.0,
    }


def test_a_plan_is_judged_against_the_best_that_is_as_cheap():
    rivals = [row("E2", 2.0, 0.5), row("E3", 3.0, 0.3), row("H1P1", 3.0, 0.4), row("E4", 4.0, 0.1)]
    mine = row("H1P1R1", 3.17, 0.2, 2)
    assert judge(mine, rivals, "rms", "cost", 3.27) == ("better", rivals[1])
    assert judge(mine, rivals, "rms", "cost", 4) == ("worse", rivals[3])
    assert judge(mine, rivals, "rms", "cost", 1.9) == ("no rival", None)
    # a cheaper plan without the refiner is a rival too
    assert judge(mine, [row("E2", 2.0, 0.15), *rivals[1:3]], "rms", "cost", 3.27)[0] == "worse"


def test_a_difference_counts_beyond_two_standard_errors():
    """The blocks of both plans swing together by 0.1, so that what counts is how the difference
    swings: by `spread`.
    """
    for gain, spread, outcome in (
        (0.05, 0.0, "better"),
        (-0.05, 0.0, "worse"),
        (0.05, 0.02, "level"),
        (-0.05, 0.02, "level"),
    ):
        mine, other = row("H1R1", 2.0, 0.5 - gain, 2, 0.1 + spread), row("E2", 2.0, 0.5, 0, 0.1)
        error = jackknife_error(
            [a - b for a, b in zip(other["rms_blocks"], mine["rms_blocks"], strict=True)]
        )
        assert error == pytest.approx(3 * spread, abs=1e-12)  # sqrt((n - 1) / n * n) spread, n = 10
        assert judge(mine, [other], "rms", "cost", 2.0)[0] == outcome


def test_jackknife_error_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=10)
    without = [float(np.delete(values, i).mean()) for i in range(10)]
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / 10**0.5, rel=1e-12)


def test_verdicts_name_winners_and_losers(measured):
    rows = [
        row("E3", 3.0, 0.3),
        row("H1P1", 3.0, 0.4),
        row("E4", 4.0, 0.1, ms=3.1),
        row("H1P1R1", 3.2, 0.2, 2),
        row("H1P2R1", 4.2, 0.15, 2, ms=2.0),
    ]
    text = quality_table({**read(measured), "rows": rows}).split("### RMS")[1].split("###")[0]
    assert "- Same cost, of 2 plans: 1 better (H1P1R1), 1 worse (H1P2R1)." in text
    assert "- Same cost, of H and P, of 2 plans: 2 better (H1P1R1, H1P2R1)." in text
    assert "- Next whole call, of 2 plans: 2 worse (H1P1R1, H1P2R1)." in text
    assert "- Same time, of 2 plans: 1 worse (H1P1R1), 1 no rival (H1P2R1)." in text
    assert (
        "| H1P1R1 | 3.20 | 0.2 | better than E3 (0.3) | better than H1P1 (0.4) | worse than E4 "
        "(0.1) | worse than E4 (0.1) |"
    ) in text


@pytest.mark.parametrize(
    "plan, said",
    [("E2", "No plan here has refiner steps."), ("H1R1", "of 1 plans: 1 no rival (H1R1).")],
)
@pytest.mark.filterwarnings("error")
def test_reports_of_one_plan(measured, tmp_path, plan, said):
    results = {
        **read(measured),
        "rows": [row for row in read(measured)["rows"] if row["plan"] == plan],
    }
    assert said in quality_table(results)
    plot_quality(results, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert min(image.size) > 600
