"""The measurement of plans for `flowturbo tune`, on images that no plan was fitted to."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import listed
from ..data.latents import digits
from ..evaluation.digit_classifier import read_images, train_classifier
from ..evaluation.metrics import rms_distance
from ..evaluation.statistics import without_blocks
from ..models.flow_model import FlowModel
from ..models.not_finite import not_finite_rows
from ..sampling.inputs import noise_of
from ..sampling.sampler import sample
from ..solver.plan import Plan, as_plan
from ..storage.resume import Keep
from .cost import CostModel, milliseconds
from .fit import Advance
from .settings import Tune


def measure(
    settings: Tune,
    model: FlowModel,
    fitting: FlowModel,
    cost_model: CostModel,
    plans: Sequence[tuple[Plan, str]],
    keep: Keep,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Measure every plan; returns one row per plan, as tuning.json holds it.

    model: the one whose images are compared; fitting: the same in float32, which computes the fine
    solution. plans: each with how it was found. ValueError for a plan that gives NaN or infinity.
    """
    images = _TestImages(settings, model, fitting, advance)
    rows: list[dict[str, Any]] = []
    for plan, how in plans:
        name = f"row {how} {json.dumps(plan.record())}"
        rows.append(keep(name, functools.partial(images.row, plan, how, cost_model)))
    if "frechet" in rows[0]:
        keep("fine frechet", lambda: images.classify(images.fine)["frechet"])

    def times() -> list[float]:
        return milliseconds(
            model,
            [plan for plan, _ in plans],
            settings.guidance,
            settings.batch_size,
            advance=advance,
        )

    # Plans are timed in turns, so the times belong to this list of plans.
    digest = hashlib.sha256(json.dumps([row["record"] for row in rows]).encode()).hexdigest()
    return [
        {**row, "ms_per_image": ms}
        for row, ms in zip(rows, keep(f"milliseconds {digest}", times), strict=True)
    ]


class _TestImages:
    """Noise and labels of the test images; the fine solution and the classifier on first use."""

    def __init__(
        self, settings: Tune, model: FlowModel, fitting: FlowModel, advance: Advance
    ) -> None:
        self.settings, self.model, self.fitting, self.advance = settings, model, fitting, advance
        self.labels = torch.arange(settings.images, device="cpu") % model.num_classes
        self.noise = noise_of(model, settings.seed, range(settings.images))
        trained_classes = model.num_classes - settings.held_class_count(model.num_classes)
        self.held = self.labels >= trained_classes

    @functools.cached_property
    def fine(self) -> Tensor:
        """Latents (N, C, H, W) of the fine solution."""
        return self._latents(self.fitting, as_plan(self.settings.reference_plan))

    @functools.cached_property
    def classify(self) -> Callable[[Tensor], dict[str, Any]]:
        """Latents -> the classifier's figures; {} for a model that is not of digits."""
        if self.model.latent_shape != (1, 8, 8) or self.model.num_classes != 10:
            return lambda latents: {}
        classifier = train_classifier(digits("train"))
        held_out = classifier.read(digits("test").mean)[0]
        return lambda latents: read_images(classifier, latents, self.labels, held_out)

    def row(self, plan: Plan, how: str, cost_model: CostModel) -> dict[str, Any]:
        latents, held = self._latents(self.model, plan), self.held
        return {
            "plan": str(plan),
            "how": how,
            "price": cost_model.of(plan),
            "predictor_calls": plan.cost.predictor,
            "refiner_calls": plan.cost.refiner,
            "rms": rms_distance(latents, self.fine),
            "rms_blocks": [
                rms_distance(latents[kept], self.fine[kept])
                for kept in without_blocks(len(latents))
            ],
            "rms_held": rms_distance(latents[held], self.fine[held]) if held.any() else None,
            **self.classify(latents),
            "record": plan.record(),
        }

    def _latents(self, model: FlowModel, plan: Plan) -> Tensor:
        """Latents (N, C, H, W) by a plan, on the CPU."""
        batches, batch_size = [], self.settings.batch_size
        for part in torch.arange(len(self.noise), device="cpu").split(batch_size):
            latents = sample(
                model,
                plan,
                self.labels[part],
                noise=self.noise[part],
                guidance=self.settings.guidance,
                batch_size=batch_size,
            )
            batches.append(latents.cpu())
            self.advance(len(part) * plan.cost.predictor)
        result = torch.cat(batches)
        if broken := not_finite_rows(result):
            raise ValueError(
                f"plan {plan} gives NaN or infinity, so it can't be measured: of {len(result)} "
                f"images these: {listed(broken)}"
            )
        return result
