"""FlowTurbo: few-call sampling of flow-matching models by Heun, pseudo-corrector and velocity-refiner steps.

import flowturbo as ft
model = ft.load("digits")
images = ft.sample(model, "H1P5R3", labels=[3, 7], guidance=2.0, seed=0, output="uint8")
"""

from .files import CheckpointError
from .models import FlowModel, load
from .plan import Plan
from .rng import noise
from .sampler import StepInfo, sample

__version__ = "0.1.0"

__all__ = ["CheckpointError", "FlowModel", "Plan", "StepInfo", "__version__", "load", "noise", "sample"]
