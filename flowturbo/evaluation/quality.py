"""`flowturbo evaluate`: the quality of plans against their cost, measured on the digits."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import finite, listed, natural, positive
from ..data.latents import digits
from ..models.flow_model import FlowModel
from ..models.load import load, model_digests
from ..models.not_finite import not_finite_rows
from ..runtime import rng
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..storage.files import save_tensors, write_text
from ..storage.provenance import environment
from ..storage.resume import resumed_report, resumed_tensors
from .digit_classifier import read_images, train_classifier
from .metrics import frechet_distance, rms_distance
from .plots import need_matplotlib, plot_quality
from .quality_report import quality_table
from .statistics import BLOCKS, family, without_blocks

PLANS = (
    *("E1", "E2", "E3", "E4", "E8", "E16"),
    *("H1", "H2", "H3", "H4", "H6", "H8"),
    *(
        "H1P1",
        "H1P2",
        "H1P3",
        "H1P4",
        "H1P5",
        "H1P6",
        "H2P4",
        "H2P5",
        "H2P8",
        "H2P9",
        "H5P7",
        "H8P9",
    ),
    *("A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A13", "A18"),
    *("B3", "B4", "B5", "B6", "B7", "B8", "B9", "B12", "B13", "B17", "B26"),
    *("C5", "C8", "C12", "C18", "C26"),
    *("U3", "U4", "U5", "U6", "U7", "U8", "U13", "D4", "D5", "D7", "D8"),
    *("X2", "X3", "X4", "U4A1", "U5A2", "U5B2", "X1A5"),
    *(
        "H1R1",
        "H1R2",
        "H1P1R1",
        "H1P1R2",
        "H1P2R1",
        "H1P2R2",
        "H1P3R2",
        "H1P5R3",
        "H2P4R2",
        "H2P8R2",
        "H5P7R3",
        "H8P9R5",
    ),
    *("H1P2S1", "H1P5S3"),
    *("E1R1", "A2R1", "A3R1", "A4R1", "B5R1"),
)
"""Plans with refiner steps, the paper's and others, and rivals from each family at the same costs,
rounded down and up to whole predictor calls.

No plan starts with P: P4 and H1P3 make the same calls.
"""


FORMAT = 1


@dataclass(frozen=True)
class Evaluate:
    """Measure quality against cost for plans of a model of digits.

    Writes a table (Markdown and JSON) and a plot. The defaults take about 20 minutes on two idle
    cores. Other work on the machine makes the milliseconds meaningless.

    To compute FID for images of any kind, use `flowturbo fid`. Its former name, this command
    with --metrics, still works.
    """

    out: Path = Path("evaluation")
    """Folder for quality.md, quality.json, quality.png and fine.safetensors, the fine solution.
    If it already holds results with the same settings, the run resumes.
    Plans may be added.
    """
    model: str = "digits"
    """A bundled name or a predictor's file. Its latents must be (1, 8, 8) and its classes ten."""
    refiner: str | None = None
    """The refiner's file. A bundled model brings its own."""
    plans: tuple[str, ...] = PLANS
    """Plans to measure, each from the same noise."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1 means none."""
    images: int = 2000
    """Images per plan. Image i has class i % 10, and its noise is a function of (seed, i)."""
    reference_images: int = 500
    """How many of these images, from the first on, are compared with the fine solution."""
    reference_plan: str = "H200"
    """Plan that computes the fine solution."""
    batch_size: int = 250
    """Images per batch. The first batch of a plan is not timed, so there must be at least two."""
    seed: int = 0
    """Seed of the noise."""
    classifier_steps: int = 1000
    """Training steps of the classifier in whose features the Fréchet distance is measured."""
    device: str | None = None
    """"cuda" (in bfloat16) or "cpu" (in float32). Default: a GPU if there is one."""

    def __post_init__(self) -> None:
        finite("guidance", self.guidance)
        natural("seed", self.seed)
        for name in ("images", "reference_images", "batch_size", "classifier_steps"):
            positive(name, getattr(self, name))
        if self.images < 2 * self.batch_size:
            raise ValueError(
                f"images must be at least 2 * batch_size = {2 * self.batch_size} (the first batch "
                f"is not timed), got {self.images}"
            )
        if not 2 * BLOCKS <= self.reference_images <= self.images:
            raise ValueError(
                f"reference_images must be from {2 * BLOCKS} to images = {self.images}, got "
                f"{self.reference_images}"
            )
        if isinstance(self.plans, str) or not self.plans:
            raise ValueError(f"plans must be a list of at least one plan, got {self.plans!r}")
        parsed = [Plan.parse(plan) for plan in self.plans]
        for i, plan in enumerate(parsed):
            if plan in parsed[:i]:
                raise ValueError(
                    f"plans must differ, but {self.plans[parsed.index(plan)]!r} and "
                    f"{self.plans[i]!r} are the same"
                )
        if Plan.parse(self.reference_plan).cost.refiner:
            raise ValueError(
                f"reference_plan must do without the refiner, got {self.reference_plan!r}"
            )


# Settings that a resumed run may change. The device is known by its name, in the environment, and
# the model by its files' digests.
_FREE = {"out", "plans", "device"}


def evaluate(settings: Evaluate) -> Path:
    """Measure every plan; returns the path of the table, quality.md.

    ValueError for a model that is not of digits, a plan that it cannot run, and a folder with
    results of other settings.
    """
    need_matplotlib()
    model = load(settings.model, settings.refiner, device=settings.device)
    plans = [Plan.parse(plan) for plan in settings.plans]
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
            f"the quality; got latents {model.latent_shape} of {model.num_classes} classes"
        )
    refined = [str(plan) for plan in plans if plan.cost.refiner]
    if refined and model.refiner is None:
        raise ValueError(f"refiner must be given: of the plans, {', '.join(refined)} need one")


def _identity(settings: Evaluate, model: FlowModel) -> dict[str, Any]:
    """What the results depend on."""
    assert model.macs is not None
    return {
        "format": FORMAT,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE},
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
    classifier = train_classifier(train, steps=settings.classifier_steps)
    held_out = classifier.read(test.mean)[0]
    results["classifier"] = {
        "held_out_accuracy": classifier.accuracy(test),
        "held_out_images": len(test),
    }
    results["floor"] = {
        "frechet": frechet_distance(classifier.read(train.mean)[0], held_out),
        "images": len(train),
    }
    noise = rng.noise(model.latent_shape, settings.seed, range(settings.images))
    labels = torch.arange(settings.images, device="cpu") % 10
    refiner_cost = results["model"]["refiner_macs"] / results["model"]["predictor_macs"]

    def cost(plan: Plan) -> float:
        return plan.cost.predictor + refiner_cost * plan.cost.refiner

    reference = Plan.parse(settings.reference_plan)
    calls = cost(reference) * settings.reference_images + sum(map(cost, pending)) * settings.images
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
            _check_finite("plans", plan, latents)
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
            write_text(path, _json(results))


def _check_finite(name: str, plan: Plan, latents: Tensor) -> None:
    if broken := not_finite_rows(latents):
        raise ValueError(
            f"{name}: {plan} gives NaN or infinity, so it can't be measured: of "
            f"{len(latents)} images these: {listed(broken)}"
        )


def _json(results: Mapping[str, Any]) -> str:
    """JSON with one line per row, so that a diff shows which plans changed."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


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
            guidance=settings.guidance,
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
        guidance=settings.guidance,
        batch_size=settings.batch_size,
        callback=advance,
    ).cpu()
    _check_finite("reference_plan", plan, fine)
    save_tensors(path, {"latents": fine}, identity)
    return fine
