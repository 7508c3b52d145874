"""`flowturbo evaluate --data`: plans of any class-conditional model, against its training set."""

from __future__ import annotations

import hashlib
import json
import operator
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.digests import model_digests
from ..models.flow_model import FlowModel
from ..runtime import rng
from ..sampling.run import integrate
from ..sampling.sampler import sample
from ..sampling.shared_calls import SharedCalls, SharedField
from ..sampling.stages import model_legs
from ..solver.stages import StagedPlan
from ..storage.files import write_text
from ..storage.provenance import environment
from ..storage.resume import resumed_report
from .class_plot import plot_classes
from .class_report import class_table
from .class_runs import Models, Run, cost_of, row_key, runs_of
from .picture_classifier import RECIPE, data_digest
from .quality_files import Growing, check_images, results_json
from .quality_settings import Evaluate
from .references import References, read_pictures
from .statistics import without_blocks

FORMAT = 1
_SETTINGS = (
    *("model", "refiner", "images", "reference_images", "reference_plan", "batch_size", "seed"),
    "classifier_steps",
)


def evaluate_classes(settings: Evaluate) -> Path:
    """Measure every plan; returns the path of the table, quality.md."""
    models = Models(settings)
    model = models["float32"]
    own = _precision(model)
    runs = runs_of(settings, model, own, own)
    if refined := [run.name for run in runs if run.plan.cost.refiner and model.refiner is None]:
        raise ValueError(f"refiner must be given: of the plans, {', '.join(refined)} need one")
    for run in runs:
        model_legs(model, run.plan)  # refuses stages that the model can't run, before any work
    data, held = read_pictures(settings, model)
    identity: dict[str, Any] = {
        "format": FORMAT,
        "settings": {name: getattr(settings, name) for name in _SETTINGS},
        "seed_rule": (
            "noise of image i: flowturbo.noise(latent_shape, seed, [i]); class of image i: the one "
            "farthest behind its share of the training set"
        ),
        "data": {
            "training": data_digest(data),
            "held_out": None if held is None else data_digest(held),
            "classifier": RECIPE,
        },
        "model": {
            **model_digests(settings.model, settings.refiner),
            **dict(zip(("predictor_macs", "refiner_macs"), model.macs or (1, 0), strict=True)),
        },
        "environment": environment(model.device, model.dtype),
    }
    path = settings.out / "quality.json"
    results = resumed_report(path, identity, {"rows": []}, "an evaluation on a training set")
    # Plans are compared in the precision that the folder was begun with.
    main = results.setdefault("precision", (settings.precisions or (own,))[0])
    runs = runs_of(settings, model, own, main)
    known = {row_key(row) for row in results["rows"]}
    for run in runs:
        if run.key in known:  # a run was killed after the row was written
            _partial(settings, run).unlink(missing_ok=True)
    if pending := [run for run in runs if run.key not in known]:
        references = References(settings, data, held)
        results["references"] = references.summary()
        _Measurement(settings, models, references, results, identity).measure(pending, path)
    write_text(settings.out / "quality.md", class_table(results))
    plot_classes(results, settings.out / "quality.png")
    return settings.out / "quality.md"


def _partial(settings: Evaluate, run: Run) -> Path:
    """The file of the images that are measured so far."""
    return settings.out / f"partial-{run.digest}.safetensors"


def _precision(model: FlowModel) -> str:
    """What `load` takes by default on the model's device."""
    return "bfloat16" if model.device.type == "cuda" else "float32"


class _Measurement:
    """Measures rows and adds them to the results.

    identity: what every stored tensor depends on.
    """

    def __init__(
        self,
        settings: Evaluate,
        models: Models,
        references: References,
        results: dict[str, Any],
        identity: dict[str, Any],
    ) -> None:
        self.settings, self.models, self.references = settings, models, references
        self.results, self.identity = results, identity
        macs = identity["model"]
        self.share = macs["refiner_macs"] / macs["predictor_macs"]
        self.bar: Any = None

    def measure(self, pending: Sequence[Run], path: Path) -> None:
        """Measure these, and write the results to `path` after each."""
        s = self.settings
        scales = list(dict.fromkeys(run.guidance for run in pending))
        fine_calls = s.reference_images * sum(map(self._fine_cost, scales))
        calls = fine_calls + s.count * sum(map(self._cost, pending))
        with tqdm(total=calls, disable=None, unit="call", unit_scale=True, smoothing=0) as self.bar:
            for scale in scales:
                fine = self._fine_solution(scale)
                runs = [run for run in pending if run.guidance == scale]
                # Plans that are not timed go through the batches together, to share calls.
                for group in [[run] for run in runs] if s.timed else [runs]:
                    for run, kept in zip(group, self._images(group, fine), strict=True):
                        self.results["rows"].append(self._row(run, kept))
                        write_text(path, results_json(self.results))
                        _partial(s, run).unlink()

    def _cost(self, run: Run) -> float:
        return cost_of(run.plan, self.share, run.guidance != 1)

    def _fine_cost(self, scale: float) -> float:
        return cost_of(self.settings.fine_plan, self.share, scale != 1)

    def _kept(self, run: Run) -> Growing:
        return Growing(_partial(self.settings, run), self.identity | {"row": run.key})

    def _fine_solution(self, scale: float) -> Tensor:
        """The reference plan's latents for the first images, (n, C, H, W), guided at all times."""
        plan, count = self.settings.fine_plan, self.settings.reference_images
        name = f"fine-{scale!r}.safetensors"
        kept = Growing(self.settings.out / name, self.identity | {"guidance": scale})
        self.bar.set_postfix_str(f"{plan}, the fine solution, guidance {scale:g}")
        run = Run(str(plan), str(plan), "", plan, scale, "float32")
        cost = self._fine_cost(scale)
        self.bar.update(cost * kept.count("latents"))
        for first in range(kept.count("latents"), count, self.settings.batch_size):
            rows = range(first, min(first + self.settings.batch_size, count))
            latents = self._sampled(run, rows, self._noise(rows))
            check_images("reference_plan", plan, latents)
            kept.add(latents=latents)
            self.bar.update(cost * len(rows))
        self.results.setdefault("fine", {"plan": str(plan), "images": count})
        return kept["latents"]

    def _noise(self, rows: range) -> Tensor:
        return rng.noise(self.models["float32"].latent_shape, self.settings.seed, rows)

    def _sampled(self, run: Run, rows: range, noise: Tensor) -> Tensor:
        """Latents of these images, on the CPU."""
        model = self.models[run.precision]
        return sample(
            model,
            run.plan,
            self.references.labels[rows.start : rows.stop],
            noise=noise,
            guidance=run.guidance,
            batch_size=self.settings.batch_size,
        ).cpu()  # waits for the device

    def _shared(self, run: Run, rows: range, noise: Tensor, calls: SharedCalls) -> Tensor:
        """`_sampled`, to rounding, with the calls of other plans of these images."""
        if isinstance(run.plan, StagedPlan):
            return self._sampled(run, rows, noise)
        model = self.models[run.precision]
        labels = self.references.labels[rows.start : rows.stop].to(model.device)
        scale = None if run.guidance == 1 else run.guidance
        field = SharedField(model, run.plan, labels, scale, calls, run.precision)
        with torch.no_grad():
            return integrate(run.plan, field, noise.to(model.device)).x.cpu()

    def _row(self, run: Run, kept: Growing) -> dict[str, Any]:
        squares = kept["squares"]
        cost = run.plan.cost
        return {
            "plan": run.name,
            "label": self._label(run),
            "family": run.family,
            "guidance": run.guidance,
            "precision": run.precision,
            "predictor_calls": cost.predictor,
            "refiner_calls": cost.refiner,
            "staged": isinstance(run.plan, StagedPlan),
            "cost": self._cost(run),
            "ms_per_image": _milliseconds(kept["seconds"], self.settings.batch_size),
            "rms": float(squares.mean().sqrt()),
            "rms_blocks": [
                float(squares[rows].mean().sqrt()) for rows in without_blocks(len(squares))
            ],
            **self.references.figures(kept["features"], kept["classes"], kept["nearest"]),
            "record": run.record,
        }

    def _label(self, run: Run) -> str:
        """The run's; if another plan was measured under it, as a file that changed, a digest too.

        So no two plans of a report have one label, at whatever guidance.
        """
        others = [row for row in self.results["rows"] if row["label"] == run.label]
        record = json.dumps(run.record)
        if all(json.dumps(row["record"]) == record for row in others):
            return run.label
        return f"{run.label} {hashlib.sha256(record.encode()).hexdigest()[:6]}"

    def _images(self, runs: Sequence[Run], fine: Tensor) -> list[Growing]:
        """Of each run's images what `_measured` returns, batch by batch."""
        count, size = self.settings.count, self.settings.batch_size
        kept = [self._kept(run) for run in runs]
        done = [one.count("classes") for one in kept]
        self.bar.update(sum(map(operator.mul, done, map(self._cost, runs))))
        for first in range(min(done), count, size):
            rows, calls = range(first, min(first + size, count)), SharedCalls()
            noise = self._noise(rows)  # which is no work of the plan
            for run, one, before in zip(runs, kept, done, strict=True):
                if first < before:
                    continue
                self.bar.set_postfix_str(f"{run.label}, guidance {run.guidance:g}")
                seconds = torch.empty(0, 2, dtype=torch.float64, device="cpu")
                if self.settings.timed:
                    start = time.perf_counter()
                    latents = self._sampled(run, rows, noise)
                    taken = time.perf_counter() - start, float(first == before)
                    seconds = torch.tensor([taken], dtype=torch.float64, device="cpu")
                else:
                    latents = self._shared(run, rows, noise, calls)
                check_images("plans", run.plan, latents)
                one.add(**self._measured(latents, fine[first : rows.stop]), seconds=seconds)
                self.bar.update(self._cost(run) * len(rows))
        return kept

    def _measured(self, latents: Tensor, fine: Tensor) -> dict[str, Tensor]:
        """Of every image: features, class, distance to the nearest, squared distance to the fine
        solution, which may be there for the first ones alone.
        """
        features, classes = self.references.classifier.read(latents)
        compared = latents[: len(fine)].double() - fine.double()
        return {
            "features": features,
            "classes": classes,
            "nearest": self.references.nearest(latents),
            "squares": compared.square().flatten(1).mean(dim=1),
        }


def _milliseconds(seconds: Tensor, batch_size: int) -> float | None:
    """Per image: the median over all batches but the first of each process, which warms up.

    seconds: rows of (time of a batch, 1 if it was the first of a process), if any were timed.
    """
    if not len(seconds):
        return None
    warm = [time for time, first in seconds.tolist() if not first]
    return 1000 * statistics.median(warm or seconds[:, 0].tolist()) / batch_size
