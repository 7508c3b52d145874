"""demo as a command: a model in a web page, on this machine. Its flags, and the server's beginning
and end.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from ..checks import finite, positive, whole
from ..demo.server import listening, quiet_gradio, serve
from ..demo.session import DemoSession
from ..evaluation.plots import need_matplotlib
from ..models.flow_model import FlowModel
from ..models.pipelines import is_pipeline
from ..solver.plan import Plan
from .options import WeightFlags, load_checkpoint

PLANS = ("H1P5R3", "H8", "H1P5", "H8P9R5", "E8", "A8")


@dataclass(frozen=True)
class Demo(WeightFlags):
    """Show a model of classes in a web page: two plans side by side, with milliseconds an image,
    and inpainting where one draws.

    And how the model's velocity changes. Everything stays on this machine. Ctrl-C ends it.
    """

    plans: tuple[str, ...] | None = None
    """Plans to choose from, the first two at the start: letters, or .json files that `tune` wrote.
    Whoever sees the page may type other letters, but no file. Left out: six, or those of them that
    need no refiner where there is none."""
    guidance: float = 1.5
    """Guidance scale at the start; 1 is none."""
    max_images: int = 16
    """Most images at a time."""
    max_steps: int = 64
    """Most steps of a plan."""
    host: str = "127.0.0.1"
    """Address to listen at: by default only this machine can see the page; 0.0.0.0 is for all who
    can reach it.
    """
    port: int = 7860
    """Port to listen at; 0 takes one that is free."""
    browser: bool = False
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        finite("guidance", self.guidance)
        positive("max_images", self.max_images)
        positive("max_steps", self.max_steps)
        if not 0 <= whole("port", self.port) < 2**16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.plans is not None and not self.plans:
            raise ValueError("plans must name at least one plan, or be left out")


def run_demo(settings: Demo) -> None:
    """Serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio: pip install 'flowturbo[demo]'")
    need_matplotlib()
    if is_pipeline(settings.model):
        raise ValueError(
            "model must be a model of classes for the demo, a .pt, .pth or .safetensors file or "
            f"'digits', got {settings.model!r}"
        )
    with listening(settings.host, settings.port) as listener, quiet_gradio():
        model = load_checkpoint(settings)
        if model.vae is None:
            raise ValueError(
                "vae must be given: the model's file names none, and the demo shows images"
            )
        model.guided(settings.guidance)  # nonsense is told before the page is
        session = DemoSession(
            model,
            plans_for(settings, model),
            max_images=settings.max_images,
            max_steps=settings.max_steps,
            name=os.path.basename(settings.model),
        )
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        serve(session, listener, address, guidance=settings.guidance, browser=settings.browser)


def plans_for(settings: Demo, model: FlowModel) -> dict[str, Plan | None]:
    """What to offer: each plan's name, and the plan itself where it comes from a file. ValueError
    for what the model can't run.
    """
    if settings.plans is None:
        return {
            text: None
            for text in PLANS
            if model.refiner is not None or not Plan.parse(text).cost.refiner
        }
    offered: dict[str, Plan | None] = {}
    for text in settings.plans:
        name = os.path.basename(text) if text.endswith(".json") else text
        if name in offered:
            raise ValueError(f"plans must have different names, got {name!r} twice")
        offered[name] = Plan.load(text) if text.endswith(".json") else None
        plan = offered[name] or Plan.parse(text)
        if plan.cost.refiner and model.refiner is None:
            raise ValueError(
                f"plans must do without refiner steps where there is no refiner, got {text!r}"
            )
        if len(plan) > settings.max_steps:
            raise ValueError(
                f"plans must have at most max_steps = {settings.max_steps} steps, got {len(plan)} "
                f"in {text!r}"
            )
    return offered
