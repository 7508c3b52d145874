"""`flowturbo tune`: find, fit and measure plans for a model, a machine and a budget."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.plots import need_matplotlib
from ..models.bundled import MODELS
from ..models.digests import model_digests
from ..models.flow_model import FlowModel
from ..models.load import load
from ..models.model_plans import find_unstaged
from ..sampling.inputs import noise_of
from ..sampling.shared_calls import SharedCalls
from ..solver.plan import Plan, shifted_grid
from ..solver.steps import MAX_PAST
from ..storage.files import write_json, write_text
from ..storage.provenance import environment
from ..storage.resume import Keep, resumed_report
from . import search, several
from .batches import batch_of
from .budgets import chosen, compared, file_name
from .cost import CostModel, call_costs, step_costs
from .fine_solutions import Fine, FineSolutions
from .fit import Advance, Batch, inserted, rms_error
from .measure import TestImages, measure
from .plot import plot_tuning
from .report import described, front_table
from .search import published
from .settings import Tune

FORMAT = 1
CALIBRATION = 2**40
"""Index of the first calibration image, above those of all test images."""

UNFINISHED = "unfinished.json"
"""File for parts of searches and fits, which is removed in the end."""

# Settings that a resumed run may change; the device is known by its name, in the environment.
_FREE = {"out", "device", "rivals", "calls", "timed"}


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
    model.guided(settings.scale)
    path, identity = settings.out / "tuning.json", _identity(settings, model)
    results = resumed_report(path, identity, {"kept": {}}, "a search")
    keep, calls = Keep(path, results), SharedCalls()
    fine = FineSolutions(settings.out / "fine", identity)
    cost_model = _cost_model(settings, model, results, keep)
    counted = results.get("network_calls", {"made": 0.0, "shared": 0.0})
    with tqdm(unit="call", unit_scale=True, disable=None) as bar:

        def advance(done: float) -> None:
            bar.update(done)
            results["network_calls"] = {
                "made": counted["made"] + calls.made,
                "shared": counted["shared"] + calls.shared,
            }

        batches = functools.cache(
            lambda: calibration_batches(settings, fitting, advance, fine, calls)
        )
        plans = (
            _find_for_budgets(settings, model, cost_model, batches, keep, identity, advance)
            if settings.calls
            else find(settings, fitting, cost_model, keep, advance, batches)
        )
        errors = _calibration_errors(settings, plans, batches, keep, advance)
        rivals = [(plan, "published") for plan in _published(settings, model, cost_model)]
        rivals += [
            (find_unstaged(rival, model.plans), Path(rival).stem) for rival in settings.rivals
        ]
        images = TestImages(settings, model, fitting, advance, fine, calls)
        rows = measure(images, cost_model, [*plans, *rivals], keep)
    results["rows"] = described(rows)
    for row, error in zip(results["rows"], errors, strict=False):
        row["calibration_rms"] = error
    results["budgets"] = [
        found for budget in settings.calls if (found := compared(budget, results["rows"]))
    ]
    write_json(keep.path, results)
    write_text(settings.out / "tuning.md", front_table(results))
    plot_tuning(results, settings.out / "tuning.png")
    _save_plans(settings, results)
    (settings.out / UNFINISHED).unlink(missing_ok=True)
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
    costs = results["costs"] = (
        keep(
            "costs",
            lambda: step_costs(
                model, settings.scale, settings.batch_size, _refines(settings, model)
            ),
        )
        if settings.timed
        else {}
    )
    if settings.budget_ms is not None:
        steps = {letter: cost for letter, cost in costs.items() if letter != "fixed"}
        cost_model = CostModel(steps, settings.budget_ms, costs["fixed"])
    else:
        cost_model = CostModel(call_costs(model), cast(float, settings.most_calls))
    one_call = Plan.parse("E1")
    if not cost_model.allows(one_call):
        raise ValueError(
            "the budget must allow one predictor call, which costs "
            f"{cost_model.of(one_call):.4g}, got {cost_model.budget:g}"
        )
    return cost_model


def _refines(settings: Tune, model: FlowModel) -> bool:
    return model.refiner is not None and settings.refiner_steps > 0


def _published(settings: Tune, model: FlowModel, cost_model: CostModel) -> list[Plan]:
    refines = _refines(settings, model)
    if settings.calls:
        return several.published(settings.calls, cost_model, refines)
    return published(cost_model, refines)


def _intervals(settings: Tune) -> list[tuple[float, float]]:
    """The guidance intervals that plans are tried with."""
    return [(0.0, 1.0)] + ([settings.guidance_interval] if settings.guidance_interval else [])


def _find_for_budgets(
    settings: Tune,
    model: FlowModel,
    cost_model: CostModel,
    batches: Callable[[], list[Batch]],
    keep: Keep,
    identity: Mapping[str, Any],
    advance: Advance,
) -> list[tuple[Plan, str]]:
    """`several.find` with the settings; parts of fits are kept in a file of their own."""
    path = settings.out / UNFINISHED
    unfinished = Keep(path, resumed_report(path, identity, {"kept": {}}, "unfinished fits"))
    refiner_steps = settings.refiner_steps if _refines(settings, model) else 0
    common = several.Search(
        cost_model, batches, refiner_steps, settings.iterations, keep, unfinished, advance
    )
    return several.find(settings.calls, common, _intervals(settings))


def find(
    settings: Tune,
    model: FlowModel,
    cost_model: CostModel,
    keep: Keep,
    advance: Advance,
    batches: Callable[[], list[Batch]] | None = None,
) -> list[tuple[Plan, str]]:
    """The best plans within the budget, each with how it was found: "searched" or "fitted".

    Searched plans have no weights; there is one for each whole predictor call. Fitted plans have
    1, 2, ... L steps, alone and with M steps. model: in float32. batches: those of
    `calibration_batches`, unless it shall compute them.
    """
    calibration = batches or functools.cache(lambda: calibration_batches(settings, model, advance))
    refiner, intervals = _refines(settings, model), _intervals(settings)
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


def _calibration_errors(
    settings: Tune,
    plans: Sequence[tuple[Plan, str]],
    batches: Callable[[], list[Batch]],
    keep: Keep,
    advance: Advance,
) -> list[float]:
    """The RMS error of each plan on the calibration images."""
    if not settings.calls:
        return keep(
            "calibration errors", lambda: [rms_error(plan, batches(), advance) for plan, _ in plans]
        )
    return [
        keep(
            f"calibration error of {json.dumps(plan.record())}",
            functools.partial(lambda plan: rms_error(plan, batches(), advance), plan),
        )
        for plan, _ in plans
    ]


def _anew(name: str, make: Callable[[], Tensor]) -> Tensor:
    return make()


def calibration_batches(
    settings: Tune,
    model: FlowModel,
    advance: Advance,
    fine: Fine = _anew,
    calls: SharedCalls | None = None,
) -> list[Batch]:
    """The images that plans are fitted to, in batches, with their fine solutions.

    model: in float32. Classes follow one another, without the held ones.
    fine: keeps the fine solutions. calls: of which the batches share those that are the same.
    """
    count = settings.calibration_images
    noise = noise_of(model, settings.seed, range(CALIBRATION, CALIBRATION + count))
    indices = torch.arange(count, device="cpu")
    held = settings.held_classes_of(model.num_classes)
    classes = torch.tensor([c for c in range(model.num_classes) if c not in held], device="cpu")
    labels = classes[indices % len(classes)]
    parts = indices.split(settings.batch_size)
    return [
        batch_of(
            settings,
            model,
            (noise[part], labels[part]),
            f"calibration-{number}",
            advance,
            fine,
            calls or SharedCalls(),
        )
        for number, part in enumerate(parts)
    ]


def _save_plans(settings: Tune, results: Mapping[str, Any]) -> None:
    """Write every fitted plan, and as best.json the plan with the least calibration error."""
    rows = [row for row in results["rows"] if row["how"] in ("fitted", "searched")]
    best = min(rows, key=lambda row: row["calibration_rms"])
    for row in rows:
        about = {
            "model": settings.model if settings.model in MODELS else Path(settings.model).name,
            **results["model"],
            "guidance": settings.scale,
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
        for budget in settings.calls:
            if row is chosen(budget, rows):
                plan.save(settings.out / file_name(budget), about)
