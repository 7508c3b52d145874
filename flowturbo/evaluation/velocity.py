"""`flowturbo inspect-velocity`: how the velocity changes along trajectories."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import finite, natural, positive
from ..models.flow_model import FlowModel
from ..models.load import load
from ..runtime import rng
from ..sampling.sampler import sample
from ..sampling.velocity_field import GuidedField
from ..solver.plan import Plan
from ..storage.files import write_text
from ..storage.provenance import environment
from .plots import need_matplotlib, plot_velocity
from .quality import _FREE

REFERENCE_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class InspectVelocity:
    """Show how a predictor's velocity changes along its trajectories, which is what caching and
    refining it rely on.
    """

    out: Path = Path("velocity")
    """Folder for velocity.json and velocity.png."""
    model: str = "digits"
    """A bundled name or a predictor's file."""
    guidance: float = 1.5
    """Scale of classifier-free guidance, 1 for none."""
    steps: int = 100
    """Heun steps of a trajectory."""
    images: int = 100
    """How many trajectories. Image i is of class i % (number of classes), and its noise a function
    of (seed, i).
    """
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
    model: FlowModel,
    *,
    guidance: float,
    steps: int,
    images: int,
    batch_size: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """How the velocity changes along trajectories of `steps` Heun steps, as `plot_velocity` draws
    it.

    times (steps + 1); for each step change, |v(t + dt) - v(t)| / |v(t)|, and rate, that divided by
    dt, each as mean and 10th and 90th percentile over the images; and cosine: for each of some
    reference times s the mean cosine of the angle between v(t) and v(s). Image i is of class i %
    (number of classes), and its noise a function of (seed, i). ValueError where a velocity is zero.
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
        cosines.append(
            torch.stack([torch.cosine_similarity(v, v[k : k + 1], dim=2) for k in references])
        )
    change, cosine = torch.cat(changes, dim=1), torch.cat(cosines, dim=2).mean(dim=2)
    return {
        "times": list(plan.grid),
        "change": _spread(change),
        "rate": _spread(change * steps),
        "cosine": {
            f"{plan.grid[k]:g}": row.tolist() for k, row in zip(references, cosine, strict=True)
        },
    }


def _spread(values: Tensor) -> dict[str, list[float]]:
    """(steps, images) -> mean and percentiles over the images."""
    return {
        "mean": values.mean(dim=1).tolist(),
        "p10": values.quantile(0.1, dim=1).tolist(),
        "p90": values.quantile(0.9, dim=1).tolist(),
    }


@torch.no_grad()
def trajectory_velocities(
    model: FlowModel, plan: Plan, labels: Tensor, noise: Tensor, guidance: float
) -> Tensor:
    """labels (N,), noise (N, C, H, W), a plan of Heun steps -> (len(plan) + 1, N, C, H, W): the
    velocity at each grid time.
    """
    field = GuidedField(
        model,
        plan,
        labels.to(model.device),
        None if guidance == 1 else guidance,
        model.guidance_channels,
    )
    calls: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(field.predict(x, float(t))[: len(x)])
        return calls[-1]

    end = sample(velocity, plan, noise=noise.to(model.device))
    # A Heun step's first call is at the trajectory's own state; its second, at the state that the
    # first one predicts, is not.
    return torch.stack([*calls[::2], velocity(end, torch.ones(()))])
