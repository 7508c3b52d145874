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
from ..sampling.run import integrate
from ..sampling.sampler import sample
from ..sampling.shared_calls import SharedCalls
from ..solver.plan import Plan
from ..storage.resume import Keep
from .batches import batch_of
from .cost import CostModel, milliseconds
from .fine_solutions import Fine
from .fit import Advance, Batch
from .settings import Tune


def measure(
    images: TestImages,
    cost_model: CostModel,
    plans: Sequence[tuple[Plan, str]],
    keep: Keep,
) -> list[dict[str, Any]]:
    """Measure every plan; returns one row per plan, as tuning.json holds it.

    plans: each with how it was found. ValueError for a plan that gives NaN or infinity.
    """
    rows: list[dict[str, Any]] = []
    for plan, how in plans:
        name = f"row {how} {json.dumps(plan.record())}"
        rows.append(keep(name, functools.partial(images.row, plan, how, cost_model)))
    if "frechet" in rows[0]:
        keep("fine frechet", lambda: images.classify(images.fine)["frechet"])
    settings = images.settings
    if not settings.timed:
        return rows

    def times() -> list[float]:
        return milliseconds(
            images.model,
            [plan for plan, _ in plans],
            settings.scale,
            settings.batch_size,
            advance=images.advance,
        )

    # Plans are timed in turns, so the times belong to this list of plans.
    digest = hashlib.sha256(json.dumps([row["record"] for row in rows]).encode()).hexdigest()
    return [
        {**row, "ms_per_image": ms}
        for row, ms in zip(rows, keep(f"milliseconds {digest}", times), strict=True)
    ]


class TestImages:
    """Noise and labels of the test images; the fine solution and the classifier on first use.

    model: the one whose images are compared; fitting: the same in float32, which computes the fine
    solution. On the CPU the two are one, and plans share their calls.
    """

    def __init__(
        self,
        settings: Tune,
        model: FlowModel,
        fitting: FlowModel,
        advance: Advance,
        fine: Fine,
        calls: SharedCalls,
    ) -> None:
        self.settings, self.model, self.fitting, self.advance = settings, model, fitting, advance
        self.kept_fine, self.calls = fine, calls
        self.labels = torch.arange(settings.images, device="cpu") % model.num_classes
        self.noise = noise_of(model, settings.seed, range(settings.images))
        held = torch.tensor(settings.held_classes_of(model.num_classes), device="cpu")
        self.held = torch.isin(self.labels, held)

    @functools.cached_property
    def batches(self) -> list[Batch]:
        """The images with their fine solution, in batches."""
        parts = torch.arange(len(self.noise), device="cpu").split(self.settings.batch_size)
        return [
            batch_of(
                self.settings,
                self.fitting,
                (self.noise[part], self.labels[part]),
                f"measured-{number}",
                self.advance,
                self.kept_fine,
                self.calls,
            )
            for number, part in enumerate(parts)
        ]

    @functools.cached_property
    def fine(self) -> Tensor:
        """Latents (N, C, H, W) of the fine solution."""
        return torch.cat([batch.fine.cpu() for batch in self.batches])

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
        if self.settings.calls and model is self.fitting:
            return self._checked(plan, torch.cat(list(map(self._shared(plan), self.batches))))
        batches, batch_size = [], self.settings.batch_size
        for part in torch.arange(len(self.noise), device="cpu").split(batch_size):
            latents = sample(
                model,
                plan,
                self.labels[part],
                noise=self.noise[part],
                guidance=self.settings.scale,
                batch_size=batch_size,
            )
            batches.append(latents.cpu())
            self.advance(len(part) * plan.cost.predictor)
        return self._checked(plan, torch.cat(batches))

    def _shared(self, plan: Plan) -> Callable[[Batch], Tensor]:
        """Batch -> its latents by a plan, whose calls are shared with those of other plans."""

        @torch.no_grad()
        def latents(batch: Batch) -> Tensor:
            self.advance(len(batch.noise) * plan.cost.predictor)
            return integrate(plan, batch.field(plan), batch.noise).x.cpu()

        return latents

    def _checked(self, plan: Plan, result: Tensor) -> Tensor:
        if broken := not_finite_rows(result):
            raise ValueError(
                f"plan {plan} gives NaN or infinity, so it can't be measured: of {len(result)} "
                f"images these: {listed(broken)}"
            )
        return result
