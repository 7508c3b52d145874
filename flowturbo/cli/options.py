"""Flags that several commands share: which model, which plan, where it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from ..models.flow_model import FlowModel
from ..models.load import load
from ..models.pipelines import from_pipeline, is_pipeline
from ..runtime.device import Dtype, dtype_of
from ..solver.plan import Plan, as_plan


@dataclass(frozen=True)
class WeightFlags:
    """Which model is loaded, and how."""

    model: Annotated[str, tyro.conf.arg(aliases=["--ckpt"])] = "digits"
    """A .pt, .pth or .safetensors file with SiT's keys, or "digits"; or folder or hub name of a
    diffusers pipeline of SD3, FLUX or 2-RF, which makes images from --prompts."""
    refiner: str | None = None
    """The refiner's file, for a pipeline its folder; the bundled model brings its own."""
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL or AutoencoderTiny, or "pixels"; left out:
    what the model's file names.
    """
    heads: int | None = None
    """Attention heads, for checkpoints of an unpublished width."""
    convention: Literal["auto", "sit", "repa", "2-rf"] = "auto"
    """"repa" for checkpoints whose time runs backwards, "2-rf" for a Stable Diffusion pipeline with
    2-RF's UNet.
    """
    device: str | None = None
    """"cuda" or "cpu"; left out: a GPU if there is one."""
    dtype: Dtype | None = None
    """Left out: bfloat16 on a GPU, float32 on the CPU."""
    quantize: Literal["fp8"] | None = None
    """"fp8" for the predictor's products in e4m3: faster on recent GPUs, and slightly other
    images.
    """


@dataclass(frozen=True)
class ModelFlags(WeightFlags):
    """Which model runs, and how."""

    plan: str | None = None
    """Steps in order, a letter with a count each: H Heun, P pseudo corrector, R refiner, S refiner
    after equation 7, E Euler, A, B, C Adams-Bashforth of order 2, 3, 4. Or a .json file with a plan
    that `tune` found. Left out: H1P5R3, or H1P5 where there is no refiner."""
    guidance: Annotated[float, tyro.conf.arg(aliases=["--cfg-scale"])] = 1.5
    """Guidance scale; 1 is none."""
    guidance_channels: int | None = None
    """Guide the first so many channels; left out: 3 of 4 for SiT's checkpoints, else all."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is on."""
    shift: float | None = None
    """Shift of the time grid as in SD3, 1 is uniform; left out: 1, and a pipeline's own."""
    grid: tuple[float, ...] | None = None
    """Own times, rising from 0 to 1, one more than there are steps."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--global-seed"])] = 0
    """Image i draws its noise from (seed, i) alone."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["--per-proc-batch-size"])] = None
    """Images at a time; left out: all."""
    prompts: tuple[str, ...] = ()
    """What to show, of models that read text."""
    negative: str | None = None
    """What not to show, of models guided by it (SD3, 2-RF)."""
    image_size: int | None = None
    """Height and width, of models that read text; left out: the model's own."""


def load_model(settings: ModelFlags) -> tuple[FlowModel, Plan, dict[str, Any]]:
    """The model, the plan, and what all ways of sampling take."""

    if settings.plan is not None:  # nonsense is told before anything is loaded
        _plan(settings, settings.plan, 1.0)
    model = _pipeline(settings) if is_pipeline(settings.model) else load_checkpoint(settings)
    text = settings.plan or ("H1P5" if model.refiner is None else "H1P5R3")
    options = dict(
        guidance=settings.guidance,
        guidance_channels=settings.guidance_channels,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=sys.stderr.isatty(),
        output="uint8",
    )
    if settings.negative is not None:
        options["negative"] = settings.negative
    return model, _plan(settings, text, model.shift), options


def _plan(settings: ModelFlags, text: str, own_shift: float) -> Plan:
    if text.endswith(".json"):
        if (
            settings.grid is not None
            or settings.shift is not None
            or settings.guidance_interval != (0.0, 1.0)
        ):
            raise ValueError(
                "a plan's file holds its grid and guidance interval: leave out grid, shift and "
                "guidance_interval"
            )
        return as_plan(text)
    shift = (
        settings.shift
        if settings.shift is not None
        else 1.0
        if settings.grid is not None
        else own_shift
    )
    return Plan.parse(
        text, grid=settings.grid, shift=shift, guidance_interval=settings.guidance_interval
    )


def load_checkpoint(settings: WeightFlags) -> FlowModel:
    """A model of classes, of the settings' files."""
    _only("a text-to-image pipeline", settings, "prompts", "negative", "image_size")
    if settings.convention == "2-rf":
        raise ValueError("convention '2-rf' is for a pipeline as model")
    return load(
        settings.model,
        settings.refiner,
        settings.vae,
        heads=settings.heads,
        device=settings.device,
        dtype=dtype_of(settings.dtype),
        convention=settings.convention,
        quantize=settings.quantize,
    )


def _pipeline(settings: ModelFlags) -> FlowModel:
    _only("a model of classes", settings, "labels", "heads", "quantize")
    if settings.convention not in ("auto", "2-rf"):
        raise ValueError(
            f"convention must be 'auto' or '2-rf' for a pipeline, got {settings.convention!r}"
        )
    if not settings.prompts:
        raise ValueError("prompts must be at least one text for a text-to-image model")
    return from_pipeline(
        settings.model,
        settings.refiner,
        settings.vae,
        convention=settings.convention,
        image_size=settings.image_size,
        device=settings.device,
        dtype=dtype_of(settings.dtype),
    )


def _only(what: str, settings: WeightFlags, *names: str) -> None:
    for name in names:
        if getattr(settings, name, None) not in (None, ()):
            raise ValueError(f"{name} is for {what}, which {settings.model!r} is not")
