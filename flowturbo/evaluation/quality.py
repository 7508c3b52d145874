"""`flowturbo evaluate`: the quality of plans against their cost, measured on the digits.

With a training set of its own a model is measured by `class_quality`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.latents import digits
from ..models.digests import model_digests
from ..models.flow_model import FlowModel
from ..models.load import load
from ..runtime import rng
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..storage.files import save_tensors, write_text
from ..storage.provenance import environment
from ..storage.resume import resumed_report, resumed_tensors
from .class_quality import evaluate_classes
from .digit_classifier import read_images, train_classifier
from .metrics import frechet_distance, rms_distance
from .plots import need_matplotlib, plot_quality
from .quality_files import check_images, results_json
from .quality_report import quality_table
from .quality_settings import PLANS, Evaluate
from .statistics import family, without_blocks

__all__ = ["PLANS", "Evaluate", "evaluate"]

FORMAT = 1

_OF_DIGITS = (
    *("model", "refiner", "guidance", "images", "reference_images", "reference_plan"),
    *("batch_size", "seed", "classifier_steps"),
)
# A resumed run may change the others. The device is known by its name, in the environment, and the
# model by its files' digests, too.


def evaluate(settings: Evaluate) -> Path:
    """Measure every plan; returns the path of the table, quality.md.

    ValueError for a model that is not of digits or not of the training set's form, a plan that it
    cannot run, and a folder with results of other settings.
    """
    need_matplotlib()
    if settings.data is not None:
        return evaluate_classes(settings)
    model = load(settings.model, settings.refiner, device=settings.device)
    plans = [Plan.parse(text) for text, _ in settings.chosen(None)]
    _check_model(model, plans)
    path = settings.out / "quality.json"
    results = resumed_report(path, _identity(settings, model), {"rows": []}, "an evaluation")
    _measure(results, path, settings, model, plans)
    write_text(settings.out / "quality.md", quality_table(results))
    plot_quality(results, settings.out / "quality.png")
    return settings.out / "quality.md"


def _check_model(model: FlowModel, plans: Sequence[Plan]) -> None:
    if model.latent_shape != (1, 8, 8) or model.num_classes != 10:
        raise ValueError(
            "model must have latents (1, 8, 8) of 10 classes, since a classifier of digits judges "
            f"the quality; got latents {model.latent_shape} of {model.num_classes} classes: for "
            "others give data, their training set"
        )
    refined = [str(plan) for plan in plans if plan.cost.refiner]
    if refined and model.refiner is None:
        raise ValueError(f"refiner must be given: of the plans, {', '.join(refined)} need one")


def _identity(settings: Evaluate, model: FlowModel) -> dict[str, Any]:
    """What the results depend on."""
    assert model.macs is not None
    (guidance,) = settings.guidance
    return {
        "format": FORMAT,
        "settings": {k: getattr(settings, k) for k in _OF_DIGITS} | {"guidance": guidance},
        "seed_rule": (
            "noise of image i: flowturbo.noise(latent_shape, seed, [i]); class of image i: i % 10"
        ),
        "model": {
            **model_digests(settings.model, settings.refiner),
            "predictor_macs": model.macs[0],
            "refiner_macs": model.macs[1],
        },
        "environment": environment(model.device, model.dtype),
    }


def _measure(
    results: dict[str, Any], path: Path, settings: Evaluate, model: FlowModel, plans: Sequence[Plan]
) -> None:
    """Add the missing rows to the results, and write these to `path` after each row."""
    measured = {row["plan"] for row in results["rows"]}
    pending = [plan for plan in plans if str(plan) not in measured]
    if not pending:
        return
    train, test = digits("train"), digits("test")
    classifier = train_classifier(train, steps=settings.steps)
    held_out = classifier.read(test.mean)[0]
    results["classifier"] = {
        "held_out_accuracy": classifier.accuracy(test),
        "held_out_images": len(test),
    }
    results["floor"] = {
        "frechet": frechet_distance(classifier.read(train.mean)[0], held_out),
        "images": len(train),
    }
    noise = rng.noise(model.latent_shape, settings.seed, range(settings.count))
    labels = torch.arange(settings.count, device="cpu") % 10
    refiner_cost = results["model"]["refiner_macs"] / results["model"]["predictor_macs"]

    def cost(plan: Plan) -> float:
        return plan.cost.predictor + refiner_cost * plan.cost.refiner

    reference = settings.fine_plan
    calls = cost(reference) * settings.reference_images + sum(map(cost, pending)) * settings.count
    with tqdm(total=calls, disable=None, unit="call", unit_scale=True, smoothing=0) as bar:
        first = slice(settings.reference_images)
        fine = _fine_solution(results, settings, model, reference, noise[first], labels[first], bar)
        results["fine"] = {"plan": str(reference), "cost": cost(reference), "images": len(fine)}
        results["fine"] |= read_images(classifier, fine, labels[first], held_out)
        for plan in pending:
            bar.set_postfix_str(str(plan))
            latents, milliseconds = _timed_run(
                model, plan, noise, labels, settings, bar, cost(plan)
            )
            check_images("plans", plan, latents)
            row = {
                "plan": str(plan),
                "family": family(plan),
                "predictor_calls": plan.cost.predictor,
                "refiner_calls": plan.cost.refiner,
                "cost": cost(plan),
                "ms_per_image": milliseconds,
                **read_images(classifier, latents, labels, held_out),
                "frechet_first": frechet_distance(classifier.read(latents[first])[0], held_out),
                "rms": rms_distance(latents[first], fine),
                "rms_blocks": [
                    rms_distance(latents[kept], fine[kept]) for kept in without_blocks(len(fine))
                ],
            }
            results["rows"].append(row)
            write_text(path, results_json(results))


def _timed_run(
    model: FlowModel,
    plan: Plan,
    noise: Tensor,
    labels: Tensor,
    settings: Evaluate,
    bar: Any,
    cost: float,
) -> tuple[Tensor, float]:
    """Latents on the CPU, and milliseconds per image.

    The time is the median over all batches but the first, which warms up.
    """
    batches, times = [], []
    for first in range(0, len(noise), settings.batch_size):
        part = slice(first, first + settings.batch_size)
        start = time.perf_counter()
        latents = sample(
            model,
            plan,
            labels[part],
            noise=noise[part],
            guidance=settings.guidance[0],
            batch_size=settings.batch_size,
        ).cpu()  # waits for the device
        times.append(time.perf_counter() - start)
        batches.append(latents)
        bar.update(cost * len(latents))
    return torch.cat(batches), 1000 * statistics.median(times[1:]) / settings.batch_size


def _fine_solution(
    results: Mapping[str, Any],
    settings: Evaluate,
    model: FlowModel,
    plan: Plan,
    noise: Tensor,
    labels: Tensor,
    bar: Any,
) -> Tensor:
    """The reference plan's latents, (N, C, H, W) on the CPU; read from a file if it was stored."""
    path = settings.out / "fine.safetensors"
    identity = {k: results[k] for k in ("settings", "model", "environment")}
    if stored := resumed_tensors(path, identity):
        bar.update(plan.cost.predictor * len(noise))
        return stored["latents"]
    bar.set_postfix_str(f"{plan}, the fine solution")

    def advance(info: Any) -> None:
        bar.update(plan.cost.predictor * len(info.x) / len(plan))

    fine = sample(
        model,
        plan,
        labels,
        noise=noise,
        guidance=settings.guidance[0],
        batch_size=settings.batch_size,
        callback=advance,
    ).cpu()
    check_images("reference_plan", plan, fine)
    save_tensors(path, {"latents": fine}, identity)
    return fine
