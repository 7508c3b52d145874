"""FlowTurbo: few-call sampling of flow-matching models by Heun, pseudo-corrector and velocity-refiner steps.

import flowturbo as ft
model = ft.load("digits")
images = ft.sample(model, "H1P5R3", labels=[3, 7], guidance=2.0, seed=0, output="uint8")
"""

from .ahead import compile, summary
from .edit import edit, inpaint
from .files import CheckpointError
from .graph import CaptureError
from .integrations.diffusers import accelerate, accelerated, restore
from .job import StepInfo
from .models import FlowModel, load
from .models.pipelines import from_pipeline
from .models.prompted import PromptModel, refiner_for
from .plan import Plan
from .rng import noise
from .sampler import sample

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "FlowModel",
    "Plan",
    "PromptModel",
    "StepInfo",
    "__version__",
    "accelerate",
    "accelerated",
    "compile",
    "edit",
    "from_pipeline",
    "inpaint",
    "load",
    "noise",
    "refiner_for",
    "restore",
    "sample",
    "summary",
]
