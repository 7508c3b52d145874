"""Batches of images with their fine solutions, for fits and for the measurement."""

from __future__ import annotations

from torch import Tensor

from ..models.flow_model import FlowModel
from ..sampling.sampler import sample
from ..sampling.shared_calls import SharedCalls, SharedField
from ..solver.plan import Plan, as_plan
from .fine_solutions import Fine
from .fit import Advance, Batch
from .settings import Tune


def batch_of(
    settings: Tune,
    model: FlowModel,
    images: tuple[Tensor, Tensor],
    name: str,
    advance: Advance,
    fine: Fine,
    calls: SharedCalls,
) -> Batch:
    """Images, as noise (N, C, H, W) and labels (N,), with their fine solution; model: in float32.

    name: tells the batch from others in `fine` and `calls`.
    """
    noise, labels = (part.to(model.device) for part in images)

    def make() -> Tensor:
        plan = as_plan(settings.reference_plan)
        calls.made += len(noise) * plan.cost.predictor
        advance(len(noise) * plan.cost.predictor)
        return sample(
            model, plan, labels, noise=noise, guidance=settings.scale, batch_size=len(noise)
        )

    solution = fine(name, make).to(model.device)
    return _batch(settings, model, (noise, labels, solution), name, calls)


def _batch(
    settings: Tune,
    model: FlowModel,
    images: tuple[Tensor, Tensor, Tensor],
    name: str,
    calls: SharedCalls,
) -> Batch:
    noise, labels, solution = images
    guidance = None if settings.scale == 1 else settings.scale

    def rows(indices: Tensor) -> Batch:
        picked = tuple(part[indices.to(part.device)] for part in images)
        return _batch(settings, model, picked, f"{name} {indices.tolist()}", calls)  # type: ignore

    def field(plan: Plan) -> SharedField:
        return SharedField(model, plan, labels, guidance, calls, name)

    return Batch(field, noise, solution, rows)
