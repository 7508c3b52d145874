"""Comparing plans: families, Pareto fronts, jackknife errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..solver.plan import Plan


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """(cost, distance) of each plan -> whether it is on the front: no other is at most as high in
    both, and lower in one.
    """
    return [
        not any(c <= cost and d <= distance and (c, d) != (cost, distance) for c, d in points)
        for cost, distance in points
    ]


BLOCKS = 10
"""Groups of images that are left out in turn, to know how far a distance hangs on which images were
made.
"""


def without_blocks(count: int) -> list[Tensor]:
    """The numbers 0 .. count - 1, with each of BLOCKS runs of neighbours left out in turn."""
    blocks = torch.arange(count).tensor_split(BLOCKS)
    return [torch.cat([*blocks[:i], *blocks[i + 1 :]]) for i in range(BLOCKS)]


def family(plan: Plan) -> str:
    """What a plan is called in tables, by its most particular steps."""
    if plan.cost.refiner:
        return "FlowTurbo" if set(plan.letters) <= set("HPRS") else "Adams-Bashforth + refiner"
    for letters, name in (("P", "pseudo corrector"), ("ABCL", "Adams-Bashforth"), ("H", "Heun")):
        if set(letters) & set(plan.letters):
            return name
    return "Euler"


Row = Mapping[str, Any]


def judge(
    row: Row, rivals: Sequence[Row], quality: str, cost: str, most: float
) -> tuple[str, Row | None]:
    """One of OUTCOMES, and the best of the rivals whose cost is at most `most`."""
    affordable = [rival for rival in rivals if rival[cost] <= most]
    if not affordable:
        return "no rival", None
    best = min(affordable, key=lambda rival: rival[quality])
    gain = best[quality] - row[quality]
    doubt = 2 * jackknife_error(
        [b - a for a, b in zip(row[f"{quality}_blocks"], best[f"{quality}_blocks"], strict=True)]
    )
    return ("better" if gain > doubt else "worse" if gain < -doubt else "level"), best


def jackknife_error(values: Sequence[float]) -> float:
    """The standard error of a figure, from its values with each of n groups left out."""
    n = len(values)
    return math.sqrt((n - 1) / n * sum((value - statistics.fmean(values)) ** 2 for value in values))
