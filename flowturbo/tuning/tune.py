"""Plans found by search: what steps cost here, which sequences, times and weights come closest to
the fine solution for that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import finite, natural, positive
from ..data.latents import digits
from ..evaluation.digit_classifier import read_images, train_classifier
from ..evaluation.metrics import rms_distance
from ..evaluation.plots import need_matplotlib
from ..evaluation.statistics import without_blocks
from ..models.flow_model import FlowModel
from ..models.load import MODELS, load, model_digests
from ..runtime import rng
from ..sampling.sampler import sample
from ..sampling.velocity_field import GuidedField
from ..solver.plan import Plan, as_plan, shifted_grid
from ..solver.steps import MAX_PAST
from ..storage.files import write_text
from ..storage.provenance import environment
from ..storage.resume import Keep, resumed_report
from . import search
from .cost import CostModel, call_costs, milliseconds, step_costs
from .fit import Advance, Batch, inserted, rms_error
from .plot import plot_tuning
from .report import described, front_table

FORMAT = 1
CALIBRATION = 2**40
"""The number of the first image that plans are fitted to: so many images are never tested."""


@dataclass(frozen=True)
class Tune:
    """Search the plans that come closest to the fine solution within a budget, and write the best
    as a file for `sample --plan`.

    Sequences of all kinds of steps, time grids, and fitted times and weights are tried on noise of
    their own, without some of the classes; then they and published plans are measured on other
    noise, of all classes.
    """

    out: Path = Path("tuning")
    """Folder for tuning.md, tuning.json, tuning.png, best.json, the plan, and plans/, the other
    fitted plans. A folder that holds results of the same settings goes on from them."""
    model: str = "digits"
    """A .pt, .pth or .safetensors file with SiT's keys, or "digits"."""
    refiner: str | None = None
    """The refiner's file; the bundled model brings its own."""
    heads: int | None = None
    """Attention heads, for checkpoints of an unpublished width."""
    budget_calls: float | None = None
    """What a plan may cost, in predictor calls; a refiner call counts by its share of
    multiply-accumulates. 6 if no budget is given."""
    budget_ms: float | None = None
    """What a plan may cost in milliseconds an image, as measured here."""
    guidance: float = 1.5
    """Scale of classifier-free guidance, 1 for none. Plans are fitted for it."""
    guidance_interval: tuple[float, float] | None = None
    """Try plans with guidance on in this interval alone too; the fine solution they are compared
    with has it everywhere.
    """
    batch_size: int = 64
    """Images at a time."""
    calibration_images: int = 192
    """Images that plans are searched and fitted on."""
    held_classes: int | None = None
    """How many classes, the last ones, have no part in that; left out: a fifth."""
    images: int = 600
    """Images that plans are measured on. Image i is of class i % (number of classes), and its noise
    a function of (seed, i).
    """
    reference_plan: str = "C80"
    """The plan of the fine solution."""
    refiner_steps: int = 2
    """Refiner steps joined to a fitted plan, at most; 0 also leaves R and S steps out."""
    iterations: int = 8
    """Of a fit, at most."""
    rivals: tuple[str, ...] = ()
    """Further plans to measure, letters or .json files."""
    seed: int = 0
    """Of all noise."""
    device: str | None = None
    """Where to run: by default cuda, in bfloat16, where there is a GPU, else cpu, in float32. Plans
    are fitted in float32.
    """

    def __post_init__(self) -> None:
        natural("seed", self.seed)
        finite("guidance", self.guidance)
        for name in ("batch_size", "calibration_images", "images", "iterations"):
            positive(name, getattr(self, name))
        natural("refiner_steps", self.refiner_steps)
        if self.images < 20:
            raise ValueError(
                "images must be at least 20, two for each group that is left out in turn, got "
                f"{self.images}"
            )
        if self.budget_calls is not None and self.budget_ms is not None:
            raise ValueError("give budget_calls or budget_ms, not both")
        if self.budget_calls is None and self.budget_ms is None:
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
        for rival in self.rivals:
            as_plan(rival)


_FREE = {"out", "device", "rivals"}


def tune(settings: Tune) -> Path:
    """Search, measure and write; returns the path of the table, tuning.md."""
    need_matplotlib()
    model = load(settings.model, settings.refiner, heads=settings.heads, device=settings.device)
    fitting = model
    if model.dtype != torch.float32:  # differences of results need its precision
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
    results["costs"] = keep(
        "costs",
        lambda: step_costs(
            model, settings.guidance, settings.batch_size, _refines(settings, model)
        ),
    )
    if settings.budget_ms is not None:
        steps = {letter: cost for letter, cost in results["costs"].items() if letter != "fixed"}
        cost_model = CostModel(steps, settings.budget_ms, results["costs"]["fixed"])
    else:
        cost_model = CostModel(call_costs(model), cast(float, settings.budget_calls))
    one = Plan.parse("E1")
    if not cost_model.allows(one):
        raise ValueError(
            f"the budget must allow one predictor call, which costs {cost_model.of(one):.4g}, got "
            f"{cost_model.budget:g}"
        )
    with tqdm(unit="call", unit_scale=True, disable=None) as bar:
        found = find(settings, fitting, cost_model, keep, bar.update)
        errors = keep(
            "calibration errors",
            lambda: _errors(settings, fitting, [plan for plan, _ in found], bar.update),
        )
        others = [
            (plan, "published") for plan in published(cost_model, bool(_refines(settings, model)))
        ]
        others += [(as_plan(rival), Path(rival).stem) for rival in settings.rivals]
        rows = measure(settings, model, fitting, cost_model, [*found, *others], keep, bar.update)
    results["rows"] = described(rows)
    for row, calibrated in zip(results["rows"], errors, strict=False):
        row["calibration_rms"] = calibrated
    write_text(keep.path, json.dumps(results, indent=1) + "\n")
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


def find(
    settings: Tune, model: FlowModel, cost_model: CostModel, keep: Keep, advance: Advance
) -> list[tuple[Plan, str]]:
    """Plans and how they were found: "searched" or "fitted"."""

    @functools.cache
    def calibration() -> list[Batch]:
        return calibration_batches(settings, model, advance)

    refiner = _refines(settings, model)
    intervals = [(0.0, 1.0)] + ([settings.guidance_interval] if settings.guidance_interval else [])
    unit = cost_model.steps["E"]

    def without_weights() -> list[dict[str, Any]]:
        return [
            plan.record()
            for plan in search.searched(
                cost_model, calibration(), refiner, intervals, unit, advance
            )
        ]

    found = [(Plan.from_record(row), "searched") for row in keep("searched", without_weights)]
    for interval in intervals:
        name, shorter = ("" if interval == (0.0, 1.0) else f" in {interval}"), None
        for n in range(1, MAX_PAST + 2):
            if not cost_model.allows(Plan("L" * n, shifted_grid(n), interval)):
                break

            def longer(
                n: int = n, shorter: Plan | None = shorter, interval: tuple[float, float] = interval
            ) -> Plan:
                return search.multistep(
                    n, shorter, calibration(), settings.iterations, interval, advance
                )

            plan = shorter = _kept_plan(keep, f"L{n}{name}", longer)
            found.append((plan, "fitted"))
            for m in range(1, settings.refiner_steps + 1 if refiner else 1):

                def refined(plan: Plan = plan) -> Plan:
                    return search.with_refiner_step(
                        plan, calibration(), settings.iterations, advance
                    )

                if len(plan) > MAX_PAST or not cost_model.allows(inserted(plan, 1, "M")):
                    break
                plan = _kept_plan(keep, f"L{n} with {m}{name}", refined)
                found.append((plan, "fitted"))
    return found


def _kept_plan(keep: Keep, name: str, make: Callable[[], Plan]) -> Plan:
    return Plan.from_record(keep(name, lambda: make().record()))


def _refines(settings: Tune, model: FlowModel) -> bool:
    return model.refiner is not None and settings.refiner_steps > 0


def _errors(
    settings: Tune, model: FlowModel, plans: Sequence[Plan], advance: Advance
) -> list[float]:
    batches = calibration_batches(settings, model, advance)
    return [rms_error(plan, batches, advance) for plan in plans]


def calibration_batches(settings: Tune, model: FlowModel, advance: Advance) -> list[Batch]:
    """The images that plans are fitted to, with their fine solutions."""
    noise = rng.noise(
        model.latent_shape,
        settings.seed,
        range(CALIBRATION, CALIBRATION + settings.calibration_images),
    )
    labels = torch.arange(settings.calibration_images) % (
        model.num_classes - held_classes(settings, model)
    )
    parts = torch.arange(settings.calibration_images).split(settings.batch_size)
    return [_batch(settings, model, noise[part], labels[part], advance) for part in parts]


def held_classes(settings: Tune, model: FlowModel) -> int:
    """How many classes plans are not fitted to."""
    if settings.held_classes is None:
        return model.num_classes // 5
    if natural("held_classes", settings.held_classes) >= model.num_classes:
        raise ValueError(
            f"held_classes must leave one of the {model.num_classes} classes, got "
            f"{settings.held_classes}"
        )
    return settings.held_classes


def published(cost_model: CostModel, refiner: bool) -> list[Plan]:
    """Plans as published, on the uniform grid: of each scheme all that the budget allows."""
    words = [letter * n for n in range(1, MAX_PAST + 2) for letter in "EABCH"]
    words += ["H" + "P" * n for n in range(1, MAX_PAST + 1)]
    if refiner:
        words += ["H" + "P" * p + "R" * r for p in range(6) for r in range(1, 4)]
    plans = [Plan(word, shifted_grid(len(word))) for word in dict.fromkeys(words)]
    # Adams-Bashforth of order k in fewer than k steps is that of a lower order.
    return [
        plan
        for plan in plans
        if cost_model.allows(plan) and len(plan) >= {"A": 2, "B": 3, "C": 4}.get(plan.letters[0], 1)
    ]


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


def measure(
    settings: Tune,
    model: FlowModel,
    fitting: FlowModel,
    cost_model: CostModel,
    found: Sequence[tuple[Plan, str]],
    keep: Keep,
    advance: Advance,
) -> list[dict[str, Any]]:
    """A row a plan, on noise that no plan was fitted to, and all classes."""
    labels = torch.arange(settings.images) % model.num_classes
    noise = rng.noise(model.latent_shape, settings.seed, range(settings.images))
    held = labels >= model.num_classes - held_classes(settings, model)

    @functools.cache
    def fine() -> Tensor:
        return _in_batches(
            settings, fitting, as_plan(settings.reference_plan), noise, labels, advance
        )

    @functools.cache
    def judge() -> Callable[[Tensor], dict[str, Any]]:
        if model.latent_shape != (1, 8, 8) or model.num_classes != 10:
            return lambda latents: {}
        classifier = train_classifier(digits("train"))
        held_out = classifier.read(digits("test").mean)[0]
        return lambda latents: read_images(classifier, latents, labels, held_out)

    def row(plan: Plan, how: str) -> dict[str, Any]:
        latents = _in_batches(settings, model, plan, noise, labels, advance)
        return {
            "plan": str(plan),
            "how": how,
            "price": cost_model.of(plan),
            "predictor_calls": plan.cost.predictor,
            "refiner_calls": plan.cost.refiner,
            "rms": rms_distance(latents, fine()),
            "rms_blocks": [
                rms_distance(latents[kept], fine()[kept]) for kept in without_blocks(len(latents))
            ],
            "rms_held": rms_distance(latents[held], fine()[held]) if held.any() else None,
            **judge()(latents),
            "record": plan.record(),
        }

    rows: list[dict[str, Any]] = []
    for plan, how in found:
        named = f"row {how} {json.dumps(plan.record())}"
        rows.append(keep(named, functools.partial(row, plan, how)))
    if "frechet" in rows[0]:
        keep("fine frechet", lambda: judge()(fine())["frechet"])

    def times() -> list[float]:
        return milliseconds(
            model,
            [plan for plan, _ in found],
            settings.guidance,
            settings.batch_size,
            advance=advance,
        )

    these = hashlib.sha256(json.dumps([row["record"] for row in rows]).encode()).hexdigest()
    return [
        {**row, "ms_per_image": ms}
        for row, ms in zip(rows, keep(f"milliseconds {these}", times), strict=True)
    ]


def _in_batches(
    settings: Tune, model: FlowModel, plan: Plan, noise: Tensor, labels: Tensor, advance: Advance
) -> Tensor:
    """Latents, on the CPU."""
    done = []
    for part in torch.arange(len(noise)).split(settings.batch_size):
        options: dict[str, Any] = dict(guidance=settings.guidance, batch_size=settings.batch_size)
        done.append(sample(model, plan, labels[part], noise=noise[part], **options).cpu())
        advance(len(part) * plan.cost.predictor)
    latents = torch.cat(done)
    if not latents.isfinite().all():
        raise ValueError(f"plan {plan} gives NaN or infinity, so it can't be measured")
    return latents


def _save_plans(settings: Tune, results: Mapping[str, Any]) -> None:
    """Every fitted plan, and as best.json the one of all that were found which errs least on the
    noise that plans are fitted to.
    """
    found = [row for row in results["rows"] if row["how"] in ("fitted", "searched")]
    best = min(found, key=lambda row: row["calibration_rms"])
    for row in found:
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
