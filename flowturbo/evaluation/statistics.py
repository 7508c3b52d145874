"""Statistics for comparing plans: Pareto fronts, jackknife errors, families, verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from ..solver.steps import EXPONENTIAL


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """(cost, distance) of each plan -> whether it is on the Pareto front.

    A plan is on the front unless another is at most equal in both and lower in one.
    """
    return [
        not any(c <= cost and d <= distance and (c, d) != (cost, distance) for c, d in points)
        for cost, distance in points
    ]


BLOCKS = 10
"""Jackknife blocks, for the standard error of each distance."""


def without_blocks(count: int) -> list[Tensor]:
    """BLOCKS index tensors: 0 .. count - 1 without the first block, without the second, ...

    Blocks are runs of consecutive indices.
    """
    blocks = torch.arange(count, device="cpu").tensor_split(BLOCKS)
    return [torch.cat([*blocks[:i], *blocks[i + 1 :]]) for i in range(BLOCKS)]


def family(plan: Plan | StagedPlan) -> str:
    """The name of a plan's family in tables and plots, by its most specific kind of step."""
    if isinstance(plan, StagedPlan):
        return "stages"
    if plan.cost.refiner:
        if set(plan.letters) <= set("HPRS"):
            return "FlowTurbo"
        exponential = set(plan.letters) & set(EXPONENTIAL)
        return "exponential + refiner" if exponential else "Adams-Bashforth + refiner"
    for letters, name in (
        ("P", "pseudo corrector"),
        ("U", "UniPC"),
        ("D", "DPM-Solver++"),
        ("X", "RES"),
        ("ABCL", "Adams-Bashforth"),
        ("H", "Heun"),
    ):
        if set(letters) & set(plan.letters):
            return name
    return "Euler"


Row = Mapping[str, Any]
"""A plan's measurements, as a report's JSON holds them."""


def name_of(row: Row) -> str:
    """How a report names a plan: its label, if it has one, tells it from the others there."""
    return str(row.get("label", row["plan"]))


def cell_of(row: Row) -> str:
    """`name_of` as it stands in a table of Markdown."""
    return name_of(row).replace("|", r"\|")


def judge(
    row: Row, rivals: Sequence[Row], quality: str, cost: str, limit: float
) -> tuple[str, Row | None]:
    """Compare a plan with the best of the rivals that cost at most `limit`.

    quality: the key of a distance, with its jackknife values under "<quality>_blocks"; cost: the
    key of a cost. Returns "better", "worse" or "level", and that rival; "no rival" and None where
    none is cheap enough. Better and worse are by more than two standard errors of the difference.
    """
    affordable = [rival for rival in rivals if rival[cost] <= limit]
    if not affordable:
        return "no rival", None
    best = min(affordable, key=lambda rival: rival[quality])
    gain = best[quality] - row[quality]
    threshold = 2 * difference_error(row, best, quality)
    return ("better" if gain > threshold else "worse" if gain < -threshold else "level"), best


def difference_error(row: Row, other: Row, quality: str) -> float:
    """The standard error of the difference of two plans, whose images come from the same noise.

    Where a measure has jackknife values over blocks of the pictures that it compares with,
    "<quality>_reference_blocks", their error is added.
    """
    kinds = [key for key in (f"{quality}_blocks", f"{quality}_reference_blocks") if key in row]
    return math.hypot(
        *(jackknife_error([b - a for a, b in zip(row[k], other[k], strict=True)]) for k in kinds)
    )


def value_error(row: Row, quality: str) -> float:
    """The standard error of a plan's figure; see `difference_error`."""
    kinds = [key for key in (f"{quality}_blocks", f"{quality}_reference_blocks") if key in row]
    return math.hypot(*(jackknife_error(row[key]) for key in kinds))


def jackknife_error(values: Sequence[float]) -> float:
    """The jackknife standard error of a statistic, from its values with each block left out."""
    n = len(values)
    return math.sqrt((n - 1) / n * sum((value - statistics.fmean(values)) ** 2 for value in values))
