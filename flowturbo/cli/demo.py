"""`flowturbo demo`: a model in a web page on this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from ..checks import finite, positive, whole
from ..demo.server import listening, quiet_gradio, serve
from ..demo.session import DemoSession
from ..evaluation.plots import need_matplotlib
from ..models.flow_model import FlowModel
from ..models.model_plans import DEFAULT, find_unstaged
from ..models.pipelines import is_pipeline
from ..solver.plan import Plan
from .options import WeightFlags, guidance_of, load_checkpoint

PLANS = ("H1P5R3", "H8", "H1P5", "H8P9R5", "E8", "A8")


@dataclass(frozen=True)
class Demo(WeightFlags):
    """Show a class-conditional model in a web page.

    The page compares two plans side by side with milliseconds per image, inpaints where visitors
    paint, and plots how the model's velocity changes. No telemetry; Ctrl-C ends it.
    """

    plans: tuple[str, ...] | None = None
    """Plans to offer, letters or .json files from `flowturbo tune`. The first two are preselected.
    Or names of plans that the model's file holds. Visitors may type other letters, but no file
    names. Default: the model's own plans and six more, those of them that need no refiner if there
    is none.
    """
    guidance: float | None = None
    """Guidance scale at the start; 1 means none.
    Default: what the model's file recommends, else 1.5.
    """
    max_images: int = 16
    """Most images per request."""
    max_steps: int = 64
    """Most steps of a plan."""
    host: str = "127.0.0.1"
    """Address to listen on.
    The default is visible on this machine alone, 0.0.0.0 to everyone who can reach it.
    """
    port: int = 7860
    """Port to listen on; 0 picks a free one."""
    browser: bool = False
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        if self.guidance is not None:
            finite("guidance", self.guidance)
        positive("max_images", self.max_images)
        positive("max_steps", self.max_steps)
        if not 0 <= whole("port", self.port) < 2**16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.plans is not None and not self.plans:
            raise ValueError("plans must name at least one plan, or be left out")


def run_demo(settings: Demo) -> None:
    """Serve the page until Ctrl-C; ValueError for settings or a model that it cannot show."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio: pip install 'flowturbo[demo]'")
    need_matplotlib()
    if is_pipeline(settings.model):
        raise ValueError(
            "model must be a model of classes for the demo, a .pt, .pth or .safetensors file or "
            f"a bundled name, got {settings.model!r}"
        )
    with listening(settings.host, settings.port) as listener, quiet_gradio():
        model = load_checkpoint(settings)
        if model.vae is None:
            raise ValueError(
                "vae must be given: the model's file names none, and the demo shows images"
            )
        guidance = guidance_of(settings.guidance, model)
        model.guided(guidance)  # validate the scale before serving the page
        session = DemoSession(
            model,
            plans_for(settings, model),
            max_images=settings.max_images,
            max_steps=settings.max_steps,
            name=os.path.basename(settings.model),
        )
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        serve(session, listener, address, guidance=guidance, browser=settings.browser)


def plans_for(settings: Demo, model: FlowModel) -> dict[str, Plan | None]:
    """The offered plans: name -> the plan if it comes from a file, else None.

    Of the model's own, the default is the first. ValueError for a plan that the model cannot run or
    that is too long.
    """
    if settings.plans is None:
        named = sorted(model.plans.items(), key=lambda item: item[0] != DEFAULT)
        own = {name: plan for name, plan in named if isinstance(plan, Plan)}
        return {
            text: plan
            for text, plan in {**own, **dict.fromkeys(PLANS)}.items()
            if (model.refiner is not None or not (plan or Plan.parse(text)).cost.refiner)
            and (plan is None or len(plan) <= settings.max_steps)
        }
    offered: dict[str, Plan | None] = {}
    for text in settings.plans:
        name = os.path.basename(text) if text.endswith(".json") else text
        if name in offered:
            raise ValueError(f"plans must have different names, got {name!r} twice")
        plan = find_unstaged(text, model.plans)
        offered[name] = plan if text.endswith(".json") or text in model.plans else None
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
