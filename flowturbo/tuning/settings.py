"""The settings of `flowturbo tune`, which are its flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..checks import finite, natural, positive
from ..models.headers import Guided, named_plans
from ..models.model_plans import find_unstaged
from ..solver.plan import Plan, as_plan


@dataclass(frozen=True)
class Tune(Guided):
    """Search for the plans that come closest to the fine solution within a budget.

    It tries sequences of all kinds of steps, time grids, and fitted times and weights on
    calibration images, which leave out some of the classes. The plans that it finds are then
    compared with published ones on other noise and all classes. The best is written as a file
    that `flowturbo sample --plan` takes.
    """

    out: Path = Path("tuning")
    """Folder for tuning.md, tuning.json, tuning.png, best.json (the plan), plans/ (fitted plans).
    If it already holds results with the same settings, the run resumes.
    """
    model: str = "digits"
    """A .pt, .pth or .safetensors file with SiT's keys, "digits" or "emoji"."""
    refiner: str | None = None
    """The refiner's file. The bundled digits bring theirs."""
    heads: int | None = None
    """Number of attention heads, for checkpoints whose width is not a published one."""
    budget_calls: float | None = None
    """Budget of a plan in predictor calls (NFE). Default: 6, if there is no --budget-ms.
    A refiner call counts as its share of multiply-accumulates.
    """
    budget_ms: float | None = None
    """Budget of a plan in milliseconds per image, as measured on this machine."""
    calls: tuple[float, ...] = ()
    """Several budgets in predictor calls, in place of --budget-calls, for instance 3 4 5 6 8.
    The report compares the plan of each, best-3.json and so on, with every published scheme.
    Budgets may be added to finished results.
    """
    timed: bool = True
    """Whether to time steps and plans, which takes as long as a search in itself.
    Without it, costs are in predictor calls alone.
    """
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 means none. Plans are fitted for this scale.
    Default: what the model's file recommends, else 1.5.
    """
    guidance_interval: tuple[float, float] | None = None
    """Also try plans with guidance in this interval of times alone.
    The fine solution always has guidance everywhere.
    """
    batch_size: int = 64
    """Images per batch."""
    calibration_images: int = 192
    """Number of images that plans are searched and fitted on."""
    held_classes: int | None = None
    """Number of classes without calibration images. Default: a fifth."""
    held: Literal["last", "spread"] = "last"
    """Which classes those are: the last ones, or as many spread evenly over all numbers."""
    images: int = 600
    """Number of images that plans are compared on.
    Image i has class i % (number of classes), and its noise is a function of (seed, i).
    """
    reference_plan: str = "C80"
    """Plan that computes the fine solution."""
    refiner_steps: int = 2
    """Most refiner steps added to a fitted plan. With 0 there are no R and S steps either."""
    iterations: int = 8
    """Most iterations of a fit."""
    rivals: tuple[str, ...] = ()
    """Further plans to compare: letters, .json files, or names of plans in the model's file."""
    seed: int = 0
    """Seed of all noise."""
    device: str | None = None
    """"cuda" (in bfloat16) or "cpu" (in float32). Default: a GPU if there is one.
    Plans are fitted in float32 on either.
    """

    def __post_init__(self) -> None:
        natural("seed", self.seed)
        self.choose_guidance()
        for name in ("batch_size", "calibration_images", "images", "iterations"):
            positive(name, getattr(self, name))
        natural("refiner_steps", self.refiner_steps)
        if self.images < 20:
            raise ValueError(
                f"images must be at least 20, two per jackknife block, got {self.images}"
            )
        if self.budget_calls is not None and self.budget_ms is not None:
            raise ValueError("give budget_calls or budget_ms, not both")
        if self.calls and (self.budget_calls is not None or self.budget_ms is not None):
            raise ValueError("give calls or one budget, not both")
        if not self.timed and self.budget_ms is not None:
            raise ValueError("timed must be True for a budget in milliseconds, got False")
        for calls in self.calls:
            if finite("calls", calls) < 1:
                raise ValueError(f"calls must be at least 1 each, got {calls}")
        object.__setattr__(self, "calls", tuple(sorted(set(map(float, self.calls)))))
        if self.budget_calls is None and self.budget_ms is None and not self.calls:
            object.__setattr__(self, "budget_calls", 6.0)
        for name in ("budget_calls", "budget_ms"):
            budget = getattr(self, name)
            if budget is not None and finite(name, budget) <= 0:
                raise ValueError(f"{name} must be above 0, got {budget}")
        if as_plan(self.reference_plan).cost.refiner:
            raise ValueError(
                f"reference_plan must do without the refiner, got {self.reference_plan!r}"
            )
        if self.guidance_interval is not None:
            Plan.parse("E1", guidance_interval=self.guidance_interval)
        named = named_plans(self.model, self.refiner)
        for rival in self.rivals:
            find_unstaged(rival, named)

    @property
    def most_calls(self) -> float | None:
        """The largest budget in predictor calls; None for one in milliseconds."""
        return max(self.calls) if self.calls else self.budget_calls

    def held_classes_of(self, num_classes: int) -> list[int]:
        """The classes of a model without calibration images, in order."""
        count = self.held_class_count(num_classes)
        if self.held == "last":
            return list(range(num_classes - count, num_classes))
        return [(2 * i + 1) * num_classes // (2 * count) for i in range(count)]

    def held_class_count(self, num_classes: int) -> int:
        """How many of a model's classes have no calibration images; ValueError if none is left."""
        if self.held_classes is None:
            return num_classes // 5
        if natural("held_classes", self.held_classes) >= num_classes:
            raise ValueError(
                f"held_classes must leave one of the {num_classes} classes, got {self.held_classes}"
            )
        return self.held_classes
