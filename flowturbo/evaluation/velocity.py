"""`flowturbo inspect-velocity`: how a model's velocity changes along its trajectories."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import listed, natural, positive
from ..models.flow_model import FlowModel
from ..models.headers import Guided
from ..models.load import load
from ..models.not_finite import NotFiniteError, not_finite_rows
from ..runtime.modes import without_autocast
from ..runtime.streams import interactive
from ..sampling.inputs import noise_of
from ..sampling.sampler import sample
from ..sampling.velocity_field import GuidedField
from ..solver.plan import Plan
from ..storage.files import write_json
from ..storage.provenance import environment
from .plots import need_matplotlib, plot_velocity

REFERENCE_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)

# The device is known by its name, in the environment.
_NOT_REPORTED = {"out", "device"}


@dataclass(frozen=True)
class InspectVelocity(Guided):
    """Plot how a predictor's velocity changes along its trajectories.

    Pseudo-corrector and refiner steps reuse a cached velocity, so they pay where it changes slowly.
    """

    out: Path = Path("velocity")
    """Folder for velocity.json and velocity.png."""
    model: str = "digits"
    """A bundled name or a predictor's file."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 means none.
    Default: what the model's file recommends, else 1.5.
    """
    steps: int = 100
    """Heun steps per trajectory."""
    images: int = 100
    """Number of trajectories.
    Image i has class i % (number of classes), and its noise is a function of (seed, i).
    """
    batch_size: int = 100
    """Images per batch."""
    seed: int = 0
    """Seed of the noise."""
    device: str | None = None
    """"cuda" (in bfloat16) or "cpu" (in float32). Default: a GPU if there is one."""

    def __post_init__(self) -> None:
        self.choose_guidance()
        natural("seed", self.seed)
        for name in ("steps", "images", "batch_size"):
            positive(name, getattr(self, name))
        Plan.parse(f"H{self.steps}")


def inspect_velocity(settings: InspectVelocity) -> Path:
    """Measure the velocity along fine trajectories; returns the path of the plot, velocity.png.

    velocity.json holds the settings, the environment and the values of `velocity_curve`.
    """
    need_matplotlib()
    model = load(settings.model, device=settings.device)
    flags = dataclasses.asdict(settings)
    options = {name: flags[name] for name in ("guidance", "steps", "images", "batch_size", "seed")}
    results = {
        "settings": {k: v for k, v in flags.items() if k not in _NOT_REPORTED},
        "environment": environment(model.device, model.dtype),
        **velocity_curve(model, **options, progress=interactive()),
    }
    write_json(settings.out / "velocity.json", results)
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
    """How the velocity changes along trajectories of `steps` Heun steps.

    Returns lists, as `plot_velocity` takes them:

    - times (steps + 1,);
    - change, |v(t + dt) - v(t)| / |v(t)| of each step, and rate, which is change / dt: each with
      mean and 10th and 90th percentile over the images, (steps,);
    - cosine: for each reference time s the mean cosine between v(t) and v(s), (steps + 1,).

    Image i has class i % (number of classes), and its noise is a function of (seed, i). ValueError
    where a velocity is zero.
    """
    plan = Plan.parse(f"H{steps}")
    references = [round(s * steps) for s in REFERENCE_TIMES]
    changes, cosines = [], []
    for first in tqdm(range(0, images, batch_size), disable=not progress, unit="batch"):
        numbers = range(first, min(first + batch_size, images))
        noise = noise_of(model, seed, numbers)
        labels = torch.tensor(numbers, device="cpu") % model.num_classes
        v = trajectory_velocities(model, plan, labels, noise, guidance).flatten(2).double().cpu()
        if broken := not_finite_rows(v.transpose(0, 1)):
            raise NotFiniteError(
                f"the model's velocity is not finite for images (seed {seed}) "
                f"{listed([numbers[i] for i in broken])}"
            )
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
    """(steps, images) -> mean, 10th and 90th percentile over the images."""
    return {
        "mean": values.mean(dim=1).tolist(),
        "p10": values.quantile(0.1, dim=1).tolist(),
        "p90": values.quantile(0.9, dim=1).tolist(),
    }


@torch.no_grad()
def trajectory_velocities(
    model: FlowModel, plan: Plan, labels: Tensor, noise: Tensor, guidance: float
) -> Tensor:
    """The velocity at each grid time of trajectories of Heun steps.

    labels (N,), noise (N, C, H, W), a plan of H steps alone -> (len(plan) + 1, N, C, H, W).
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

    with without_autocast(model.device):
        end = sample(velocity, plan, noise=noise.to(model.device))
        # A Heun step's first call is at a state of the trajectory; its second is at the Euler
        # prediction, which is not.
        return torch.stack(
            [*calls[::2], velocity(end, torch.ones((), dtype=torch.float32, device="cpu"))]
        )
