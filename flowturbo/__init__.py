"""FlowTurbo: few-call sampling of flow-matching models.

A plan such as H1P5R3 combines Heun, pseudo corrector and velocity refiner steps.

    import flowturbo as ft
    model = ft.load("emoji")
    images = ft.sample(model, "A6", ["smiley", "heart"], guidance=2.0, seed=0, output="uint8")
"""

from .integrations.diffusers import accelerate, accelerated, restore, summary
from .integrations.stages import sample_stages
from .models.flow_model import FlowModel
from .models.load import load
from .models.not_finite import NotFiniteError
from .models.pipelines import from_pipeline
from .models.text_to_image import PromptModel, refiner_for
from .runtime.cuda_graphs import CaptureError
from .runtime.rng import noise
from .sampling.compile import compile
from .sampling.edit import edit, inpaint
from .sampling.enlarge import resized_noise
from .sampling.run import StepInfo
from .sampling.sampler import sample
from .solver.plan import Plan
from .solver.stages import Stage, StagedPlan
from .storage.files import CheckpointError
from .version import __version__

__all__ = [
    "CaptureError",
    "CheckpointError",
    "FlowModel",
    "NotFiniteError",
    "Plan",
    "PromptModel",
    "Stage",
    "StagedPlan",
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
    "resized_noise",
    "restore",
    "sample",
    "sample_stages",
    "summary",
]
