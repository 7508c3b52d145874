"""`flowturbo tune`: find, fit and measure plans for a model, a machine and a budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.plots import need_matplotlib
from ..models.flow_model import FlowModel
from ..models.load import MODELS, load, model_digests
from ..models.model_plans import find_unstaged
from ..sampling.inputs import noise_of
from ..sampling.sampler import sample
from ..sampling.velocity_field import GuidedField
from ..solver.plan import Plan, as_plan, shifted_grid
from ..solver.steps import MAX_PAST
from ..storage.files import write_json, write_text
from ..storage.provenance import environment
from ..storage.resume import Keep, resumed_report
from . import search
from .cost import CostModel, call_costs, step_costs
from .fit import Advance, Batch, inserted, rms_error
from .measure import measure
from .plot import plot_tuning
from .report import described, front_table
from .search import published
from .settings import Tune

FORMAT = 1
CALIBRATION = 2**40
"""Index of the first calibration image, above those of all test images."""

# Settings that a resumed run may change; the device is known by its name, in the environment.
_FREE = {"out", "device", "rivals"}


def tune(settings: Tune) -> Path:
    """Search, measure and write the results; returns the path of the table, tuning.md.

    ValueError for a budget below one predictor call, and for a folder with other results.
    """
    need_matplotlib()
    model = load(settings.model, settings.refiner, heads=settings.heads, device=settings.device)
    fitting = model
    if model.dtype != torch.float32:  # fits take differences of results, which need precision
        fitting = load(
            settings.model,
            settings.refiner,
            heads=settings.heads,
            device=settings.device,
            dtype=torch.float32,
        )
    model.guided(settings.guidance)
    path = settings.out / "tuning.json"
    results = resumed_report(path, _identity(settings, model), {"kept": {}}, "a search")
    keep = Keep(path, results)
    cost_model = _cost_model(settings, model, results, keep)
    with tqdm(unit="call", unit_scale=True, disable=None) as bar:
        plans = find(settings, fitting, cost_model, keep, bar.update)
        errors = keep(
            "calibration errors",
            lambda: _errors(settings, fitting, [plan for plan, _ in plans], bar.update),
        )
        rivals = [(plan, "published") for plan in published(cost_model, _refines(settings, model))]
        rivals += [
            (find_unstaged(rival, model.plans), Path(rival).stem) for rival in settings.rivals
        ]
        rows = measure(settings, model, fitting, cost_model, [*plans, *rivals], keep, bar.update)
    results["rows"] = described(rows)
    for row, error in zip(results["rows"], errors, strict=False):
        row["calibration_rms"] = error
    write_json(keep.path, results)
    write_text(settings.out / "tuning.md", front_table(results))
    plot_tuning(results, settings.out / "tuning.png")
    _save_plans(settings, results)
    return settings.out / "tuning.md"


def _identity(settings: Tune, model: FlowModel) -> dict[str, Any]:
    """What the results depend on."""
    return {
        "format": FORMAT,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE},
        "model": model_digests(settings.model, settings.refiner),
        "environment": environment(model.device, model.dtype),
    }


def _cost_model(settings: Tune, model: FlowModel, results: dict[str, Any], keep: Keep) -> CostModel:
    """The costs of steps in the unit of the budget; the results get those in milliseconds too."""
    costs = results["costs"] = keep(
        "costs",
        lambda: step_costs(
            model, settings.guidance, settings.batch_size, _refines(settings, model)
        ),
    )
    if settings.budget_ms is not None:
        steps = {letter: cost for letter, cost in costs.items() if letter != "fixed"}
        cost_model = CostModel(steps, settings.budget_ms, costs["fixed"])
    else:
        cost_model = CostModel(call_costs(model), cast(float, settings.budget_calls))
    one_call = Plan.parse("E1")
    if not cost_model.allows(one_call):
        raise ValueError(
            "the budget must allow one predictor call, which costs "
            f"{cost_model.of(one_call):.4g}, got {cost_model.budget:g}"
        )
    return cost_model


def _refines(settings: Tune, model: FlowModel) -> bool:
    return model.refiner is not None and settings.refiner_steps > 0


def find(
    settings: Tune, model: FlowModel, cost_model: CostModel, keep: Keep, advance: Advance
) -> list[tuple[Plan, str]]:
    """The best plans within the budget, each with how it was found: "searched" or "fitted".

    Searched plans have no weights; there is one for each whole predictor call. Fitted plans have
    1, 2, ... L steps, alone and with M steps. model: in float32.
    """

    @functools.cache
    def calibration() -> list[Batch]:
        return calibration_batches(settings, model, advance)

    refiner = _refines(settings, model)
    intervals = [(0.0, 1.0)] + ([settings.guidance_interval] if settings.guidance_interval else [])
    unit = cost_model.steps["E"]

    def searched() -> list[dict[str, Any]]:
        plans = search.searched(cost_model, calibration(), refiner, intervals, unit, advance)
        return [plan.record() for plan in plans]

    plans = [(Plan.from_record(record), "searched") for record in keep("searched", searched)]
    for interval in intervals:
        suffix, shorter = ("" if interval == (0.0, 1.0) else f" in {interval}"), None
        for n in range(1, MAX_PAST + 2):
            if not cost_model.allows(Plan("L" * n, shifted_grid(n), interval)):
                break

            def multistep(
                n: int = n, shorter: Plan | None = shorter, interval: tuple[float, float] = interval
            ) -> Plan:
                return search.multistep(
                    n, shorter, calibration(), settings.iterations, interval, advance
                )

            plan = shorter = _kept_plan(keep, f"L{n}{suffix}", multistep)
            plans.append((plan, "fitted"))
            for m in range(1, settings.refiner_steps + 1 if refiner else 1):

                def with_refiner_step(plan: Plan = plan) -> Plan:
                    return search.with_refiner_step(
                        plan, calibration(), settings.iterations, advance
                    )

                if len(plan) > MAX_PAST or not cost_model.allows(inserted(plan, 1, "M")):
                    break
                plan = _kept_plan(keep, f"L{n} with {m}{suffix}", with_refiner_step)
                plans.append((plan, "fitted"))
    return plans


def _kept_plan(keep: Keep, name: str, fit: Callable[[], Plan]) -> Plan:
    return Plan.from_record(keep(name, lambda: fit().record()))


def _errors(
    settings: Tune, model: FlowModel, plans: Sequence[Plan], advance: Advance
) -> list[float]:
    """The RMS error of each plan on the calibration images."""
    batches = calibration_batches(settings, model, advance)
    return [rms_error(plan, batches, advance) for plan in plans]


def calibration_batches(settings: Tune, model: FlowModel, advance: Advance) -> list[Batch]:
    """The images that plans are fitted to, in batches, with their fine solutions.

    model: in float32. Classes follow one another, without the held ones.
    """
    count = settings.calibration_images
    noise = noise_of(model, settings.seed, range(CALIBRATION, CALIBRATION + count))
    indices = torch.arange(count, device="cpu")
    labels = indices % (model.num_classes - settings.held_class_count(model.num_classes))
    parts = indices.split(settings.batch_size)
    return [_batch(settings, model, noise[part], labels[part], advance) for part in parts]


def _batch(
    settings: Tune, model: FlowModel, noise: Tensor, labels: Tensor, advance: Advance
) -> Batch:
    plan = as_plan(settings.reference_plan)
    noise, labels = noise.to(model.device), labels.to(model.device)
    fine = sample(
        model, plan, labels, noise=noise, guidance=settings.guidance, batch_size=len(noise)
    )
    advance(len(noise) * plan.cost.predictor)
    guidance = None if settings.guidance == 1 else settings.guidance
    return Batch(
        lambda plan: GuidedField(model, plan, labels, guidance, model.guidance_channels),
        noise,
        fine,
    )


def _save_plans(settings: Tune, results: Mapping[str, Any]) -> None:
    """Write every fitted plan, and as best.json the plan with the least calibration error."""
    rows = [row for row in results["rows"] if row["how"] in ("fitted", "searched")]
    best = min(rows, key=lambda row: row["calibration_rms"])
    for row in rows:
        about = {
            "model": settings.model if settings.model in MODELS else Path(settings.model).name,
            **results["model"],
            "guidance": settings.guidance,
            "rms_to_the_fine_solution": row["rms"],
            "standard_error": row["rms_error"],
            "predictor_calls": row["predictor_calls"],
            "refiner_calls": row["refiner_calls"],
        }
        plan = Plan.from_record(row["record"])
        if row["how"] == "fitted":
            plan.save(settings.out / "plans" / f"{plan.letters}.json", about)
        if row is best:
            plan.save(settings.out / "best.json", about)
