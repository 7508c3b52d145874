"""What `flowturbo evaluate` runs on a training set: plans, each with guidance and precision."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..models.flow_model import FlowModel
from ..models.load import load
from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from .quality_settings import Evaluate
from .statistics import family


class Run(NamedTuple):
    """A row of the report.

    name: of the plan. label: the name with what else tells the row from others of its scale.
    precision: one of PRECISIONS.
    """

    name: str
    label: str
    family: str
    plan: Plan | StagedPlan
    guidance: float
    precision: str

    @property
    def record(self) -> dict[str, Any]:
        """The plan as values that JSON can hold."""
        staged = isinstance(self.plan, StagedPlan)
        return {"stages": self.plan.record()} if staged else self.plan.record()  # type: ignore

    @property
    def key(self) -> str:
        """What tells rows apart, as text."""
        return row_key(
            {"record": self.record, "guidance": self.guidance, "precision": self.precision}
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]


def row_key(row: dict[str, Any]) -> str:
    """`Run.key` of a report's row."""
    return json.dumps([row["record"], row["guidance"], row["precision"]])


def runs_of(settings: Evaluate, model: FlowModel, precision: str, main: str) -> list[Run]:
    """Every plan with every guidance scale, interval and precision.

    precision: of the device, where the settings name none. main: the one that labels leave out.
    ValueError for two that are the same.
    """
    runs = []
    plans = settings.chosen(model)
    named = Counter(Path(text).name for text, _ in plans)
    for scale in settings.guidance:
        for text, plan in plans:
            own = text in model.plans
            fitted = own or text.endswith(".json")
            name = str(plan)
            if fitted:
                name = text if own or named[Path(text).name] > 1 else Path(text).name
            for variant in [plan] if fitted or scale == 1 else _with_intervals(plan, settings):
                low, high = getattr(variant, "guidance_interval", (0, 1))
                where = "" if (low, high) == (0, 1) or fitted else f" [{low:g}-{high:g}]"
                for chosen in settings.precisions or (precision,):
                    label = name + where + (f" {chosen}" if chosen != main else "")
                    kind = "fitted" if fitted else family(variant)
                    runs.append(Run(name, label, kind, variant, scale, chosen))
    _check_different(runs)
    return runs


def _check_different(runs: Sequence[Run]) -> None:
    """ValueError for two that are the same, such as a plan by name and its letters."""
    labels: dict[str, str] = {}
    for run in runs:
        if run.key in labels:
            raise ValueError(
                f"plans with their guidance intervals must differ, but {labels[run.key]!r} and "
                f"{run.label!r} are the same"
            )
        labels[run.key] = run.label


def _with_intervals(plan: Plan | StagedPlan, settings: Evaluate) -> list[Plan | StagedPlan]:
    if isinstance(plan, StagedPlan) or not settings.guidance_intervals:
        return [plan]
    return [
        dataclasses.replace(plan, guidance_interval=interval)
        for interval in settings.guidance_intervals
    ]


def cost_of(plan: Plan | StagedPlan, share: float, guided: bool) -> float:
    """The cost of a plan in predictor calls at full size.

    share: of a predictor call's cost that a refiner call has. guided: whether the scale is not 1; a
    call is then of both halves, and one outside the guidance interval counts as half of it. A call
    of a stage counts as its share of the finished image's values.
    """
    if isinstance(plan, StagedPlan):
        return sum(
            float(stage.size) ** 2 * cost_of(part, share, guided)
            for stage, part in zip(plan.stages, plan.plans, strict=True)
        )
    cost = plan.cost
    calls = cost.predictor + share * cost.refiner
    whole = cost.guided_predictor + share * cost.guided_refiner
    return (calls + whole) / 2 if guided else calls


class Models:
    """The model in each precision, loaded when it is first asked for."""

    def __init__(self, settings: Evaluate) -> None:
        self.settings = settings
        self.loaded: dict[str, FlowModel] = {}

    def __getitem__(self, precision: str) -> FlowModel:
        if precision not in self.loaded:
            s = self.settings
            dtype = None if precision == "fp8" else getattr(torch, precision)
            quantize: Literal["fp8"] | None = "fp8" if precision == "fp8" else None
            self.loaded[precision] = load(
                s.model, s.refiner, device=s.device, dtype=dtype, quantize=quantize
            )
        return self.loaded[precision]
