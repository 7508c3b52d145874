"""UniPC and DPM-Solver++ of diffusers as plans, to be measured by `flowturbo tune --rivals`, with
the same sampler as ours.

    python bench/solvers.py rivals && flowturbo tune --rivals rivals/*.json

Both are linear: from noise x and model outputs v0, v1, ... they call the model at x plus weighted
outputs. The weights are read off by running the scheduler on unit vectors in the place of images.
Of each solver and number of steps there are two plans: on diffusers' grid without shift, and with
the shift that comes closest to the fine solution on the tuner's calibration noise.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from flowturbo import Plan, load
from flowturbo.tuning.fit import rms_error
from flowturbo.tuning.tune import Tune, calibration_batches

FLOW: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SOLVERS: dict[str, Any] = {
    "UniPC2": lambda shift: UniPCMultistepScheduler(**FLOW, flow_shift=shift, solver_order=2),
    "UniPC3": lambda shift: UniPCMultistepScheduler(**FLOW, flow_shift=shift, solver_order=3),
    "DPM++2M": lambda shift: DPMSolverMultistepScheduler(**FLOW, flow_shift=shift, solver_order=2),
}
SHIFTS = (1.0, 0.5, 0.7, 1.4, 2.0, 3.0)


def grid_of(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Our times of its calls, and 1. Its first noise level is 0.999 or so, where ours is 1: both
    start from the noise.
    """
    scheduler.set_timesteps(steps)
    return (0.0, *(1 - float(s) for s in scheduler.sigmas[1:steps]), 1.0)


def run(scheduler: Any, steps: int, noise: Tensor, velocity: Any) -> Tensor:
    """The scheduler as diffusers' pipelines run it; velocity(x, number of the call) -> data -
    noise.
    """
    scheduler.set_timesteps(steps)
    x = noise
    for call, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(-velocity(x, call), timestep, x, return_dict=False)[0]
    return x


def plan_of(scheduler: Any, steps: int) -> Plan:
    """Its solver as L steps: call k is made at the noise plus the velocities weighted by the
    difference of two rows.
    """
    points: list[Tensor] = []
    units = torch.eye(steps + 1, dtype=torch.float64).reshape(steps + 1, 1, 1, 1, steps + 1)

    def velocity(x: Tensor, call: int) -> Tensor:
        points.append(x.reshape(-1))
        return units[call + 1]

    points.append(run(scheduler, steps, units[0], velocity).reshape(-1))
    rows = []
    for k in range(steps):
        change = points[k + 1] - points[k]
        assert abs(change[0]) < 1e-3, "the noise keeps its weight"
        rows.append(tuple(change[1 : k + 2].flip(0).tolist()))
    return Plan("L" * steps, grid_of(scheduler, steps), weights=tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=int, default=6, help="steps of the longest plan")
    options = parser.parse_args()
    settings = Tune(calibration_images=64)
    batches = calibration_batches(
        settings, load(settings.model, dtype=torch.float32), lambda calls: None
    )
    for name, make in SOLVERS.items():
        for steps in range(2, options.most + 1):
            plans = {}
            for shift in SHIFTS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    plans[shift] = plan_of(make(shift), steps)
            errors = {shift: rms_error(plan, batches) for shift, plan in plans.items()}
            best = min(errors, key=lambda shift: errors[shift])
            for label, shift in {"": 1.0, " shifted": best}.items():
                about = {"solver": name, "shift": shift, "steps": steps}
                plans[shift].save(options.out / f"{name}{label}-{steps}.json", about)
            print(
                f"{name} {steps}: " + ", ".join(f"shift {s:g} {e:.4f}" for s, e in errors.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
