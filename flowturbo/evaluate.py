"""Quality against cost, measured: a table and a plot of plans; and how the velocity changes along a trajectory."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import rng
from .checks import finite, natural, positive
from .circumstances import changes, environment, model_digests
from .data import digits
from .field import GuidedField
from .files import CheckpointError, load_tensors, save_tensors, write_text
from .metrics import DigitClassifier, frechet_distance, pareto_front, rms_distance, train_classifier
from .models import FlowModel, load
from .plan import Plan
from .plots import need_matplotlib, plot_quality, plot_velocity
from .sampler import sample

PLANS = (
    *("E1", "E2", "E3", "E4", "E8", "E16"),
    *("H1", "H2", "H3", "H4", "H6", "H8"),
    *("H1P1", "H1P2", "H1P3", "H1P4", "H1P5", "H1P6", "H2P4", "H2P5", "H2P8", "H2P9", "H5P7", "H8P9"),
    *("A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A13", "A18"),
    *("B3", "B4", "B5", "B6", "B7", "B8", "B9", "B12", "B13", "B17", "B26"),
    *("C5", "C8", "C12", "C18", "C26"),
    *("H1R1", "H1R2", "H1P1R1", "H1P1R2", "H1P2R1", "H1P2R2", "H1P3R2", "H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3", "H8P9R5"),
    *("H1P2S1", "H1P5S3"),
    *("E1R1", "A2R1", "A3R1", "A4R1", "B5R1"),
)
"""Plans with refiner steps, the paper's and others, and rivals of each family at their costs, rounded down and up to whole calls.

No plan starts with P: P4 and H1P3 run the same calls."""

BLOCKS = 10
"""Groups of images that are left out in turn, to know how far a distance hangs on which images were made."""

FORMAT = 1


@dataclass(frozen=True)
class Evaluate:
    """Measure plans of a model of the digits: quality against cost, as a table (Markdown, JSON) and a plot.

    About 20 minutes with the defaults on two idle cores. Whatever else runs on the machine falsifies the milliseconds.

    With --metrics, images of any kind are scored instead, as published figures are: evaluate --metrics fid --help has those flags.
    """

    out: Path = Path("evaluation")
    """Folder for quality.md, quality.json, quality.png, and fine.safetensors, the fine solution. A folder that holds plans measured
    with the same settings goes on from them; plans may be added."""
    model: str = "digits"
    """A bundled name or a predictor's file; of latents (1, 8, 8) and 10 classes."""
    refiner: str | None = None
    """The refiner's file; a bundled model brings its own."""
    plans: tuple[str, ...] = PLANS
    """Plans to measure, each on the same noise."""
    guidance: float = 1.5
    """Scale of classifier-free guidance, 1 for none."""
    images: int = 2000
    """Images a plan. Image i is of class i % 10, and its noise a function of (seed, i)."""
    reference_images: int = 500
    """How many of them, the first, are compared with the fine solution."""
    reference_plan: str = "H200"
    """The plan of the fine solution."""
    batch_size: int = 250
    """Images at a time. The first batch of a plan is not timed, so images must be at least two batches."""
    seed: int = 0
    """Of the noise."""
    classifier_steps: int = 1000
    """Training steps of the classifier whose features give the Fréchet distance."""
    device: str | None = None
    """Where to run: by default cuda, in bfloat16, where there is a GPU, else cpu, in float32."""

    def __post_init__(self) -> None:
        finite("guidance", self.guidance)
        natural("seed", self.seed)
        for name in ("images", "reference_images", "batch_size", "classifier_steps"):
            positive(name, getattr(self, name))
        if self.images < 2 * self.batch_size:
            raise ValueError(
                f"images must be at least 2 * batch_size = {2 * self.batch_size} (the first batch is not timed), got {self.images}"
            )
        if not 2 * BLOCKS <= self.reference_images <= self.images:
            raise ValueError(f"reference_images must be from {2 * BLOCKS} to images = {self.images}, got {self.reference_images}")
        if isinstance(self.plans, str) or not self.plans:
            raise ValueError(f"plans must be a list of at least one plan, got {self.plans!r}")
        parsed = [Plan.parse(plan) for plan in self.plans]
        for i, plan in enumerate(parsed):
            if plan in parsed[:i]:
                raise ValueError(f"plans must differ, but {self.plans[parsed.index(plan)]!r} and {self.plans[i]!r} are the same")
        if Plan.parse(self.reference_plan).cost.refiner:
            raise ValueError(f"reference_plan must do without the refiner, got {self.reference_plan!r}")


# May differ between an evaluation and its continuation. The model is known by its files' digests, the device by its name.
_FREE = {"out", "plans", "device"}


def evaluate(settings: Evaluate) -> Path:
    """Measure every plan; returns the path of the table, quality.md."""
    need_matplotlib()
    model = load(settings.model, settings.refiner, device=settings.device)
    plans = [Plan.parse(plan) for plan in settings.plans]
    _check_model(model, plans)
    path = settings.out / "quality.json"
    results = _begin(path, settings, model)
    _measure(results, path, settings, model, plans)
    write_text(settings.out / "quality.md", quality_table(results))
    plot_quality(results, settings.out / "quality.png")
    return settings.out / "quality.md"


def _check_model(model: FlowModel, plans: Sequence[Plan]) -> None:
    if model.latent_shape != (1, 8, 8) or model.num_classes != 10:
        raise ValueError(
            f"model must have latents (1, 8, 8) of 10 classes, as the digits are, since quality is judged by a classifier of "
            f"digits; got latents {model.latent_shape} of {model.num_classes} classes"
        )
    refined = [str(plan) for plan in plans if plan.cost.refiner]
    if refined and model.refiner is None:
        raise ValueError(f"refiner must be given: of the plans, {', '.join(refined)} need one")


def _begin(path: Path, settings: Evaluate, model: FlowModel) -> dict[str, Any]:
    """The results so far of an evaluation with these settings, or new ones without rows."""
    assert model.macs is not None
    ours: dict[str, Any] = {
        "format": FORMAT,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE},
        "seed_rule": "noise of image i: flowturbo.noise(latent_shape, seed, [i]); class of image i: i % 10",
        "model": {
            **model_digests(settings.model, settings.refiner),
            "predictor_macs": model.macs[0],
            "refiner_macs": model.macs[1],
        },
        "environment": environment(model.device, model.dtype),
    }
    if not path.exists():
        return {**ours, "rows": []}
    before = _read(path)
    changed = changes(before, ours, ("settings", "model", "environment"))
    if changed:
        raise ValueError(
            f"{path} belongs to an evaluation with other settings ({'; '.join(changed)}): choose another folder as out"
        )
    return before


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
        known = results["format"] == FORMAT
        known = known and all(isinstance(results[k], dict) for k in ("settings", "model", "environment"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of an evaluation: {error!r}") from None
    if not known:
        raise ValueError(f"{path} holds no results of an evaluation of format {FORMAT}")
    return results


def _measure(results: dict[str, Any], path: Path, settings: Evaluate, model: FlowModel, plans: Sequence[Plan]) -> None:
    """Add the rows that are missing, each written to `path` as it comes."""
    done = {row["plan"] for row in results["rows"]}
    pending = [plan for plan in plans if str(plan) not in done]
    if not pending:
        return
    train, test = digits("train"), digits("test")
    classifier = train_classifier(train, steps=settings.classifier_steps)
    held_out = classifier.read(test.mean)[0]
    results["classifier"] = {"held_out_accuracy": classifier.accuracy(test), "held_out_images": len(test)}
    results["floor"] = {"frechet": frechet_distance(classifier.read(train.mean)[0], held_out), "images": len(train)}
    noise = rng.noise(model.latent_shape, settings.seed, range(settings.images))
    labels = torch.arange(settings.images) % 10
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
            latents, milliseconds = _timed_run(model, plan, noise, labels, settings, bar, cost(plan))
            if not latents.isfinite().all():
                raise ValueError(f"plans: {plan} gives NaN or infinity, so it can't be measured")
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
                "rms_blocks": [rms_distance(latents[kept], fine[kept]) for kept in without_blocks(len(fine))],
            }
            results["rows"].append(row)
            write_text(path, _json(results))


def read_images(classifier: DigitClassifier, latents: Tensor, labels: Tensor, held_out: Tensor) -> dict[str, Any]:
    """What the classifier says of images."""
    features, classes = classifier.read(latents)
    return {
        "frechet": frechet_distance(features, held_out),
        "frechet_blocks": [frechet_distance(features[kept], held_out) for kept in without_blocks(len(latents))],
        "label_share": float((classes == labels).double().mean()),
    }


def without_blocks(count: int) -> list[Tensor]:
    """The numbers 0 .. count - 1, with each of BLOCKS runs of neighbours left out in turn."""
    blocks = torch.arange(count).tensor_split(BLOCKS)
    return [torch.cat([*blocks[:i], *blocks[i + 1 :]]) for i in range(BLOCKS)]


def _json(results: Mapping[str, Any]) -> str:
    """As JSON, a line a row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _timed_run(
    model: FlowModel, plan: Plan, noise: Tensor, labels: Tensor, settings: Evaluate, bar: Any, cost: float
) -> tuple[Tensor, float]:
    """Latents on the CPU, and milliseconds an image: the median over all batches but the first, which warms up."""
    done, times = [], []
    for first in range(0, len(noise), settings.batch_size):
        part = slice(first, first + settings.batch_size)
        begun = time.perf_counter()
        latents = sample(
            model, plan, labels[part], noise=noise[part], guidance=settings.guidance, batch_size=settings.batch_size
        ).cpu()  # waits for the device
        times.append(time.perf_counter() - begun)
        done.append(latents)
        bar.update(cost * len(latents))
    return torch.cat(done), 1000 * statistics.median(times[1:]) / settings.batch_size


def _fine_solution(
    results: Mapping[str, Any], settings: Evaluate, model: FlowModel, plan: Plan, noise: Tensor, labels: Tensor, bar: Any
) -> Tensor:
    """The reference plan's latents, from the file of an earlier part of this evaluation if there is one."""
    path = settings.out / "fine.safetensors"
    identity = {k: results[k] for k in ("settings", "model", "environment")}
    if path.exists():
        tensors, described = load_tensors(path)
        if described != identity:
            raise CheckpointError(f"{path} belongs to an evaluation with other settings: choose another folder as out")
        bar.update(plan.cost.predictor * len(noise))
        return tensors["latents"]
    bar.set_postfix_str(f"{plan}, the fine solution")

    def advance(info: Any) -> None:
        bar.update(plan.cost.predictor * len(info.x) / len(plan))

    fine = sample(
        model, plan, labels, noise=noise, guidance=settings.guidance, batch_size=settings.batch_size, callback=advance
    ).cpu()
    save_tensors(path, {"latents": fine}, identity)
    return fine


def family(plan: Plan) -> str:
    """What a plan is called in tables, by its most particular steps."""
    if plan.cost.refiner:
        return "FlowTurbo" if set(plan.letters) <= set("HPRS") else "Adams-Bashforth + refiner"
    for letters, name in (("P", "pseudo corrector"), ("ABCL", "Adams-Bashforth"), ("H", "Heun")):
        if set(letters) & set(plan.letters):
            return name
    return "Euler"


MEASURES = {"rms": "RMS distance to the fine solution", "frechet": "Fréchet distance to held-out digits"}


def quality_table(results: Mapping[str, Any]) -> str:
    """Results as Markdown: circumstances, the table sorted by cost, and what it says of plans with refiner steps."""
    s, e, c = results["settings"], results["environment"], results["classifier"]
    floor, fine, macs = results["floor"], results["fine"], results["model"]
    rows = sorted(results["rows"], key=lambda row: (row["cost"], row["plan"]))
    lines = [
        "# Quality against cost",
        "",
        f"Model {Path(s['model']).name}, guidance {s['guidance']:g}, {s['images']} images a plan (seed {s['seed']}, image i is of "
        f"class i % 10), batches of {s['batch_size']}; {e['dtype']} on {e['device']}, threads: {e['threads']}, torch {e['torch']}.",
        "",
        "- cost: predictor-call equivalents; a refiner call has "
        f"{macs['refiner_macs'] / macs['predictor_macs']:.3f} of the multiply-accumulates of a predictor call.",
        "- ms/image: of the whole plan, median over all batches but the first.",
        f"- RMS: distance a pixel (black is -1, white 1) to the {fine['plan']} solution from the same noise, over the first "
        f"{fine['images']} images.",
        f"- Fréchet: distance to {c['held_out_images']} held-out digits in the features of a small classifier, which recognises "
        f"{c['held_out_accuracy']:.1%} of them. The {floor['images']} training digits are at {floor['frechet']:.2f}, the floor.",
        "- right class: share of images that this classifier gives the class they were made for.",
        "",
        "Bold: on the Pareto front of this distance against cost; no other plan is as cheap and better, or as good and cheaper.",
        "",
        "| plan | family | predictor calls | refiner calls | cost | ms/image | RMS | Fréchet | right class |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    fronts = {key: pareto_front([(row["cost"], row[key]) for row in rows]) for key in MEASURES}
    for i, row in enumerate(rows):
        rms, frechet = (
            f"**{row[key]:.{digits}f}**" if fronts[key][i] else f"{row[key]:.{digits}f}"
            for key, digits in (("rms", 4), ("frechet", 2))
        )
        lines.append(
            f"| {row['plan']} | {row['family']} | {row['predictor_calls']} | {row['refiner_calls']} | {row['cost']:.2f} "
            f"| {row['ms_per_image']:.2f} | {rms} | {frechet} | {row['label_share']:.1%} |"
        )
    near = min(rows, key=lambda row: row["rms"])
    lines += [
        "",
        f"The {fine['plan']} solution itself, of {fine['images']} images, has Fréchet {fine['frechet']:.2f} and "
        f"{fine['label_share']:.1%} of the right class. Fewer images give larger Fréchet distances: {near['plan']}, the closest "
        f"plan, has {near['frechet_first']:.2f} over the same {fine['images']}.",
        "",
        "## Plans with refiner steps",
        "",
        *verdicts(rows),
        "",
    ]
    return "\n".join(lines)


Row = Mapping[str, Any]

HEUN = frozenset({"Heun", "pseudo corrector"})
ALL = HEUN | {"Euler", "Adams-Bashforth"}
RIVALS: tuple[tuple[str, frozenset[str], str, Callable[[Row], float]], ...] = (
    ("same cost", ALL, "cost", lambda row: 1.03 * row["cost"]),
    ("same cost, of H and P", HEUN, "cost", lambda row: 1.03 * row["cost"]),
    ("next whole call", ALL, "cost", lambda row: math.ceil(row["cost"])),
    ("same time", ALL, "ms_per_image", lambda row: 1.03 * row["ms_per_image"]),
)
"""Whom a plan with refiner steps is set against: plans without, of some families, of at most so much of some cost."""

OUTCOMES = {"better": "better than", "level": "level with", "worse": "worse than", "no rival": "no rival as cheap"}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For each distance, which plans with refiner steps beat every plan without at their cost, and which don't."""
    refined = [row for row in rows if row["refiner_calls"]]
    rivals = [row for row in rows if not row["refiner_calls"]]
    if not refined:
        return ["No plan here has refiner steps."]
    lines = [
        "Each is set against the best of all plans without refiner steps of at most the same cost (and 3 % more); of those, of "
        "Heun and pseudo-corrector steps alone; of all of at most its cost rounded up to whole predictor calls; and of all of at "
        "most the same milliseconds (and 3 % more). Better and worse are by more than two standard errors of the difference "
        f"(jackknife over {BLOCKS} groups of images, the same noise for both)."
    ]
    for quality, title in MEASURES.items():
        columns = []
        for _, families, cost, limit in RIVALS:
            chosen = [rival for rival in rivals if rival["family"] in families]
            columns.append([judge(row, chosen, quality, cost, limit(row)) for row in refined])
        lines += ["", f"### {title}", ""]
        for (whom, *_), column in zip(RIVALS, columns, strict=True):
            counts = []
            for outcome in OUTCOMES:
                plans = [row["plan"] for row, (found, _) in zip(refined, column, strict=True) if found == outcome]
                counts += [f"{len(plans)} {outcome} ({', '.join(plans)})"] if plans else []
            lines.append(f"- {whom[0].upper()}{whom[1:]}, of {len(refined)} plans: {', '.join(counts)}.")
        lines += [
            "",
            "| plan | cost | distance | " + " | ".join(whom for whom, *_ in RIVALS) + " |",
            "|---|--:|--:|---|---|---|---|",
        ]
        for row, *found in zip(refined, *columns, strict=True):
            cells = (OUTCOMES[outcome] + (f" {best['plan']} ({best[quality]:.3g})" if best else "") for outcome, best in found)
            lines.append(f"| {row['plan']} | {row['cost']:.2f} | {row[quality]:.3g} | {' | '.join(cells)} |")
    return lines


def judge(row: Row, rivals: Sequence[Row], quality: str, cost: str, most: float) -> tuple[str, Row | None]:
    """One of OUTCOMES, and the best of the rivals whose cost is at most `most`."""
    affordable = [rival for rival in rivals if rival[cost] <= most]
    if not affordable:
        return "no rival", None
    best = min(affordable, key=lambda rival: rival[quality])
    gain = best[quality] - row[quality]
    doubt = 2 * jackknife_error([b - a for a, b in zip(row[f"{quality}_blocks"], best[f"{quality}_blocks"], strict=True)])
    return ("better" if gain > doubt else "worse" if gain < -doubt else "level"), best


def jackknife_error(values: Sequence[float]) -> float:
    """The standard error of a figure, from its values with each of n groups left out."""
    n = len(values)
    return math.sqrt((n - 1) / n * sum((value - statistics.fmean(values)) ** 2 for value in values))


REFERENCE_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class InspectVelocity:
    """Show how a predictor's velocity changes along its trajectories, which is what caching and refining it rely on."""

    out: Path = Path("velocity")
    """Folder for velocity.json and velocity.png."""
    model: str = "digits"
    """A bundled name or a predictor's file."""
    guidance: float = 1.5
    """Scale of classifier-free guidance, 1 for none."""
    steps: int = 100
    """Heun steps of a trajectory."""
    images: int = 100
    """How many trajectories. Image i is of class i % (number of classes), and its noise a function of (seed, i)."""
    batch_size: int = 100
    """Images at a time."""
    seed: int = 0
    """Of the noise."""
    device: str | None = None
    """Where to run: by default cuda, in bfloat16, where there is a GPU, else cpu, in float32."""

    def __post_init__(self) -> None:
        finite("guidance", self.guidance)
        natural("seed", self.seed)
        for name in ("steps", "images", "batch_size"):
            positive(name, getattr(self, name))
        Plan.parse(f"H{self.steps}")


def inspect_velocity(settings: InspectVelocity) -> Path:
    """Measure the velocity along fine trajectories; returns the path of the plot, velocity.png.

    velocity.json holds what `velocity_curve` finds.
    """
    need_matplotlib()
    model = load(settings.model, device=settings.device)
    asked = dataclasses.asdict(settings)
    measured = {name: asked[name] for name in ("guidance", "steps", "images", "batch_size", "seed")}
    results = {
        "settings": {k: v for k, v in asked.items() if k not in _FREE},
        "environment": environment(model.device, model.dtype),
        **velocity_curve(model, **measured, progress=sys.stderr.isatty()),
    }
    write_text(settings.out / "velocity.json", json.dumps(results, indent=1) + "\n")
    plot_velocity(results, settings.out / "velocity.png")
    return settings.out / "velocity.png"


def velocity_curve(
    model: FlowModel, *, guidance: float, steps: int, images: int, batch_size: int, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """How the velocity changes along trajectories of `steps` Heun steps, as `plot_velocity` draws it.

    times (steps + 1); for each step change, |v(t + dt) - v(t)| / |v(t)|, and rate, that divided by dt, each as mean and 10th and
    90th percentile over the images; and cosine: for each of some reference times s the mean cosine of the angle between v(t) and
    v(s). Image i is of class i % (number of classes), and its noise a function of (seed, i). ValueError where a velocity is zero.
    """
    plan = Plan.parse(f"H{steps}")
    references = [round(s * steps) for s in REFERENCE_TIMES]
    changes, cosines = [], []
    for first in tqdm(range(0, images, batch_size), disable=not progress, unit="batch"):
        numbers = range(first, min(first + batch_size, images))
        noise = rng.noise(model.latent_shape, seed, numbers)
        labels = torch.tensor(numbers) % model.num_classes
        v = trajectory_velocities(model, plan, labels, noise, guidance).flatten(2).double().cpu()
        sizes = v.norm(dim=2)
        if not sizes.all():
            raise ValueError("the model has a velocity of zero: is it trained?")
        changes.append((v[1:] - v[:-1]).norm(dim=2) / sizes[:-1])
        cosines.append(torch.stack([torch.cosine_similarity(v, v[k : k + 1], dim=2) for k in references]))
    change, cosine = torch.cat(changes, dim=1), torch.cat(cosines, dim=2).mean(dim=2)
    return {
        "times": list(plan.grid),
        "change": _spread(change),
        "rate": _spread(change * steps),
        "cosine": {f"{plan.grid[k]:g}": row.tolist() for k, row in zip(references, cosine, strict=True)},
    }


def _spread(values: Tensor) -> dict[str, list[float]]:
    """(steps, images) -> mean and percentiles over the images."""
    return {
        "mean": values.mean(dim=1).tolist(),
        "p10": values.quantile(0.1, dim=1).tolist(),
        "p90": values.quantile(0.9, dim=1).tolist(),
    }


@torch.no_grad()
def trajectory_velocities(model: FlowModel, plan: Plan, labels: Tensor, noise: Tensor, guidance: float) -> Tensor:
    """labels (N,), noise (N, C, H, W), a plan of Heun steps -> (len(plan) + 1, N, C, H, W): the velocity at each grid time."""
    field = GuidedField(model, plan, labels.to(model.device), None if guidance == 1 else guidance, model.guidance_channels)
    calls: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(field.predict(x, float(t))[: len(x)])
        return calls[-1]

    end = sample(velocity, plan, noise=noise.to(model.device))
    # A Heun step's first call is at the trajectory's own state; its second, at the state that the first one predicts, is not.
    return torch.stack([*calls[::2], velocity(end, torch.ones(()))])
