"""Flags that several commands share: the model, the plan, the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from ..models.flow_model import FlowModel
from ..models.headers import GUIDANCE, named_plans
from ..models.load import load
from ..models.model_plans import DEFAULT, Plans, find_plan
from ..models.pipelines import from_pipeline, is_pipeline
from ..runtime.device import Dtype, dtype_of
from ..runtime.streams import interactive
from ..solver.plan import Plan, as_plan
from ..solver.plan_text import has_stages
from ..solver.stages import StagedPlan
from ..storage.text import argument


@dataclass(frozen=True)
class WeightFlags:
    """Flags of the model that is loaded."""

    model: Annotated[str, tyro.conf.arg(aliases=["--ckpt"])] = "emoji"
    """A .pt, .pth or .safetensors file with SiT's keys, or a bundled model, "emoji" or "digits".
    Or the folder or hub name of a diffusers pipeline of images, which needs --prompts: SD3, FLUX.1,
    FLUX.2, Qwen-Image, Z-Image or 2-RF.
    """
    refiner: str | None = None
    """The refiner's file, for a pipeline its folder. The bundled "digits" bring their own."""
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL or AutoencoderTiny, "pixels" (grey) or "rgb".
    Default: the one that the model's file names.
    """
    heads: int | None = None
    """Number of attention heads, for checkpoints whose width is not a published one."""
    convention: Literal["auto", "sit", "repa", "2-rf"] = "auto"
    """"repa" for checkpoints whose time runs backwards.
    "2-rf" for a Stable Diffusion pipeline with 2-RF's UNet.
    """
    device: str | None = None
    """"cuda" or "cpu". Default: a GPU if there is one."""
    dtype: Dtype | Literal["auto"] | None = None
    """Data type of the model. Default: bfloat16 on a GPU, float32 on the CPU.
    "auto": bfloat16 also on a CPU that has instructions for it; `flowturbo info` says so.
    """
    null_class: int | Literal["auto", "none"] = "auto"
    """Row of the label table that guidance takes for no label; "none" if there is none.
    Default: as the file says, else the last row.
    """
    assume_velocity: bool = False
    """Take the model for a velocity on the straight path even if its file says that it is none."""
    quantize: Literal["fp8"] | None = None
    """"fp8" runs the predictor's matrix products in e4m3.
    This is faster on recent GPUs and gives slightly different images.
    """


@dataclass(frozen=True)
class ModelFlags(WeightFlags):
    """Flags of the model and of how it samples."""

    plan: str | None = None
    """Steps in order, each a letter with a count, or a .json file from `flowturbo tune`.
    Or the name of a plan that the model's file holds, which `flowturbo info --model` lists.
    Default: the one that the model's file calls "default". Else B7, which measures best on the
    digits at seven calls. For text-to-image models, whose guidance is stronger, A7; with --refiner
    the paper's H1P5R3.
    H is Heun, P pseudo corrector, R refiner, S refiner by the paper's equation 7, E Euler.
    A, B and C are Adams-Bashforth of order 2, 3 and 4, U UniPC-2, D DPM-Solver++ 2M, X res_2s.
    `flowturbo sample` takes stages: "A4 at 1/2 + A3 from 0.6", for text-to-image models and for
    sizes that the model was trained on.
    """
    guidance: Annotated[float | None, tyro.conf.arg(aliases=["--cfg-scale"])] = None
    """Scale of classifier-free guidance; 1 means none.
    Default: what the model's file recommends, else 1.5.
    """
    guidance_channels: int | None = None
    """Apply guidance to this many channels, from the first on.
    Default: 3 of 4 for SiT's checkpoints, all for others.
    """
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is applied; 0 is noise, 1 is data."""
    shift: float | None = None
    """Shift of the time grid as in SD3; 1 is uniform. Default: the pipeline's own, otherwise 1."""
    grid: tuple[float, ...] | None = None
    """Times of the grid, rising from 0 to 1, one more than there are steps."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--global-seed"])] = 0
    """Seed of the noise; that of image i is a function of (seed, i)."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["--per-proc-batch-size"])] = None
    """Images per batch. Default: all of them."""
    prompts: tuple[str, ...] = ()
    """Prompts, for text-to-image models."""
    negative: str | None = None
    """Negative prompt, for text-to-image models with classifier-free guidance (SD3, 2-RF)."""
    image_size: int | None = None
    """Height and width of the images, for text-to-image models and for models of classes.
    Default: the model's own. A seed gives a model of classes one composition at every size.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(map(argument, self.prompts)))
        if labels := getattr(self, "labels", None):
            names = (argument(label) if isinstance(label, str) else label for label in labels)
            object.__setattr__(self, "labels", tuple(names))
        if self.negative is not None:
            object.__setattr__(self, "negative", argument(self.negative))


def load_model(settings: ModelFlags) -> tuple[FlowModel, Plan, dict[str, Any]]:
    """The model, the plan, and the options of `sample`, `edit` and `inpaint`."""
    _check_plan(settings, stages=False)
    model, plan, options = _loaded(settings, stages=False)
    assert isinstance(plan, Plan)
    return model, plan, options


def load_model_and_stages(
    settings: ModelFlags,
) -> tuple[FlowModel, Plan | StagedPlan, dict[str, Any]]:
    """As `load_model`, for commands that take plans with stages."""
    _check_plan(settings, stages=True)
    return _loaded(settings, stages=True)


def _check_plan(settings: ModelFlags, stages: bool) -> None:
    """ValueError for a plan that can't be meant, before the model is loaded."""
    if settings.plan is not None:
        plan = _plan(settings, settings.plan, named_plans(settings.model, settings.refiner), 1.0)
        if not stages:
            as_plan(plan)  # type: ignore[arg-type]


def _loaded(
    settings: ModelFlags, stages: bool
) -> tuple[FlowModel, Plan | StagedPlan, dict[str, Any]]:
    model = _pipeline(settings) if is_pipeline(settings.model) else load_checkpoint(settings)
    text = settings.plan or _default_plan(settings, model, stages)
    options = dict(
        guidance=guidance_of(settings.guidance, model),
        guidance_channels=settings.guidance_channels,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=interactive(),
        output="uint8",
    )
    if settings.negative is not None:
        options["negative"] = settings.negative
    return model, _plan(settings, text, model.plans, model.shift), options


def guidance_of(asked: float | None, model: FlowModel) -> float:
    """The scale that was asked for, else what the model's file recommends, else 1.5."""
    if asked is not None:
        return asked
    return GUIDANCE if model.guidance is None else model.guidance


def default_plan(model: FlowModel, stages: bool = False) -> str | None:
    """The name of the model's own default plan, if it has one that it can run.

    stages: whether it may have stages.
    """
    plan = model.plans.get(DEFAULT)
    runs = plan is not None and (model.refiner is not None or not plan.cost.refiner)
    return DEFAULT if runs and (stages or isinstance(plan, Plan)) else None


def _default_plan(settings: ModelFlags, model: FlowModel, stages: bool) -> str:
    if own := default_plan(model, stages):
        return own
    if settings.refiner is not None:
        return "H1P5R3"
    return "A7" if is_pipeline(settings.model) else "B7"


def _plan(settings: ModelFlags, text: str, named: Plans, own_shift: float) -> Plan | StagedPlan:
    if text.endswith(".json") or has_stages(text) or text in named:
        if (
            settings.grid is not None
            or settings.shift is not None
            or settings.guidance_interval != (0.0, 1.0)
        ):
            holder = "a plan with stages" if has_stages(text) else "a plan's file"
            holder = f"the model's plan {text!r}" if text in named else holder
            raise ValueError(
                f"{holder} holds its grid and guidance interval: leave out grid, shift and "
                "guidance_interval" + ", or give a plan as letters" * (text in named)
            )
        return find_plan(text, named, own_shift)
    shift = (
        settings.shift
        if settings.shift is not None
        else 1.0
        if settings.grid is not None
        else own_shift
    )
    find_plan(text, named)  # which names the model's own plans if this is none
    return Plan.parse(
        text, grid=settings.grid, shift=shift, guidance_interval=settings.guidance_interval
    )


def load_checkpoint(settings: WeightFlags) -> FlowModel:
    """Load a class-conditional model; ValueError for flags that only pipelines have."""
    _only("a text-to-image pipeline", settings, "prompts", "negative")
    if settings.convention == "2-rf":
        raise ValueError("convention '2-rf' is for a pipeline as model")
    return load(
        settings.model,
        settings.refiner,
        settings.vae,
        heads=settings.heads,
        device=settings.device,
        dtype="auto" if settings.dtype == "auto" else dtype_of(settings.dtype),
        convention=settings.convention,
        quantize=settings.quantize,
        null_class=None if settings.null_class == "none" else settings.null_class,
        assume_velocity=settings.assume_velocity,
        image_size=getattr(settings, "image_size", None),
    )


def _pipeline(settings: ModelFlags) -> FlowModel:
    _only("a model of classes", settings, "labels", "heads", "quantize")
    _only("a model of classes", settings, "null_class", "assume_velocity")
    if settings.convention not in ("auto", "2-rf"):
        raise ValueError(
            f"convention must be 'auto' or '2-rf' for a pipeline, got {settings.convention!r}"
        )
    if not settings.prompts:
        raise ValueError("prompts must be at least one text for a text-to-image model")
    model = from_pipeline(
        settings.model,
        settings.refiner,
        settings.vae,
        convention=settings.convention,
        image_size=settings.image_size,
        device=settings.device,
        dtype="auto" if settings.dtype == "auto" else dtype_of(settings.dtype),
    )
    if len(model.latent_shape) != 3:
        raise ValueError(
            f"model must make images, and {settings.model!r} makes videos: use ft.sample in Python"
        )
    return model


def _only(what: str, settings: WeightFlags, *names: str) -> None:
    """ValueError if a flag is set that is only for another kind of model."""
    for name in names:
        if getattr(settings, name, None) not in (None, (), False, "auto"):
            raise ValueError(f"{name} is for {what}, which {settings.model!r} is not")
