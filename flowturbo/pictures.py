"""sample, edit, inpaint and verify as commands: settings that are flags, files in, files out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from .distributed import workers
from .edit import edit, image_size, inpaint
from .files import atomic_write
from .generate import LabelRule, class_labels, generate
from .grid import labelled_grid
from .images import box_mask, read_image, read_mask, read_npz, read_transparency
from .models import FlowModel, load
from .models.pipelines import from_pipeline, is_pipeline
from .plan import Plan, as_plan
from .sampler import sample
from .shards import join, verify

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Weights:
    """Which model is loaded, and how."""

    model: Annotated[str, tyro.conf.arg(aliases=["--ckpt"])] = "digits"
    """A .pt, .pth or .safetensors file with SiT's keys, or "digits"; or folder or hub name of a diffusers pipeline of SD3, FLUX or
    2-RF, which makes images from --prompts."""
    refiner: str | None = None
    """The refiner's file, for a pipeline its folder; the bundled model brings its own."""
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL or AutoencoderTiny, or "pixels"; left out: what the model's file names."""
    heads: int | None = None
    """Attention heads, for checkpoints of an unpublished width."""
    convention: Literal["auto", "sit", "repa", "2-rf"] = "auto"
    """"repa" for checkpoints whose time runs backwards, "2-rf" for a Stable Diffusion pipeline with 2-RF's UNet."""
    device: str | None = None
    """"cuda" or "cpu"; left out: a GPU if there is one."""
    dtype: Dtype | None = None
    """Left out: bfloat16 on a GPU, float32 on the CPU."""
    quantize: Literal["fp8"] | None = None
    """"fp8" for the predictor's products in e4m3: faster on recent GPUs, and slightly other images."""


@dataclass(frozen=True)
class Model(Weights):
    """Which model runs, and how."""

    plan: str | None = None
    """Steps in order, a letter with a count each: H Heun, P pseudo corrector, R refiner, S refiner after equation 7, E Euler,
    A, B, C Adams-Bashforth of order 2, 3, 4. Or a .json file with a plan that `tune` found. Left out: H1P5R3, or H1P5 where there
    is no refiner."""
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


def _loaded(settings: Model) -> tuple[FlowModel, Plan, dict[str, Any]]:
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


def _plan(settings: Model, text: str, own_shift: float) -> Plan:
    if text.endswith(".json"):
        if settings.grid is not None or settings.shift is not None or settings.guidance_interval != (0.0, 1.0):
            raise ValueError("a plan's file holds its grid and guidance interval: leave out grid, shift and guidance_interval")
        return as_plan(text)
    shift = settings.shift if settings.shift is not None else 1.0 if settings.grid is not None else own_shift
    return Plan.parse(text, grid=settings.grid, shift=shift, guidance_interval=settings.guidance_interval)


def load_checkpoint(settings: Weights) -> FlowModel:
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


def _pipeline(settings: Model) -> FlowModel:
    _only("a model of classes", settings, "labels", "heads", "quantize")
    if settings.convention not in ("auto", "2-rf"):
        raise ValueError(f"convention must be 'auto' or '2-rf' for a pipeline, got {settings.convention!r}")
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


def _only(what: str, settings: Weights, *names: str) -> None:
    for name in names:
        if getattr(settings, name, None) not in (None, ()):
            raise ValueError(f"{name} is for {what}, which {settings.model!r} is not")


def _check_out(out: Path) -> None:
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"out must end in .png or .npz, got {str(out)!r}")


def _write(out: Path, images: Tensor, labels: Sequence[int] | Sequence[str], before: Tensor | None = None) -> None:
    """A grid, under the images that were there before if any; or the images as numbers."""
    with atomic_write(out) as file:
        if out.suffix == ".npz":
            np.savez(file, arr_0=images.cpu().numpy(), labels=np.array(labels))
        elif len(images) == 1 and before is None and isinstance(labels[0], str):
            Image.fromarray(images[0].cpu().numpy()).save(file, format="PNG")
        else:
            names = [str(label) for label in labels]
            if before is None:
                picture = labelled_grid(images, names)
            else:
                picture = labelled_grid(torch.cat([before.cpu(), images.cpu()]), [*[""] * len(before), *names], columns=len(names))
            picture.save(file, format="PNG")


def _said(out: Path, count: int, plan: Plan) -> str:
    cost = plan.cost
    return f"{out}: {count} images by {plan} ({cost.predictor} predictor and {cost.refiner} refiner calls)"


@dataclass(frozen=True)
class Sample(Model):
    """Sample images by a plan. With no arguments: ten digits by the bundled model, as samples.png."""

    labels: tuple[int, ...] | None = None
    """Class numbers; left out: all of the model's."""
    prompts_file: Path | None = None
    """A text file with a prompt a line, in the place of --prompts."""
    label_rule: LabelRule = "cycle"
    """Image i gets: "cycle": of the labels or prompts number i, from the first again after the last; "random": one drawn from
    (seed, i)."""
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-fid-samples"])] = None
    """How many images; left out: one of each label or prompt, and ten where --labels says nothing."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--sample-dir"])] = Path("samples.png")
    """A labelled grid (.png; the image itself where a prompt makes one); an .npz with arr_0 (N, height, width, 3), uint8, and
    labels; or, without a suffix, a folder of such files, with a manifest: for large sets, also under torchrun, which go on from
    what is there."""
    shard_size: int | None = None
    """Images a file of a folder, a multiple of --batch-size; left out: the first from 256 on (--batch-size is then 64)."""


def run_sample(settings: Sample) -> str:
    if settings.num is not None and settings.num < 1:
        raise ValueError(f"num must be at least 1, got {settings.num}")
    if settings.prompts_file is not None:
        if settings.prompts:
            raise ValueError("give prompts or prompts_file, not both")
        settings = replace(settings, prompts=read_prompts(settings.prompts_file))
    if settings.out.is_dir() or settings.out.suffix[1:].isdigit() or not settings.out.suffix:  # a folder may be called cfg1.5
        return _sample_set(settings)
    _check_out(settings.out)
    model, plan, options = _loaded(settings)
    labels = _labels(settings, model)
    _write(settings.out, sample(model, plan, labels, **options), labels)
    return _said(settings.out, len(labels), plan)


def _labels(settings: Sample, model: FlowModel) -> list[Any]:
    given: Sequence[Any] = settings.prompts or settings.labels or range(model.num_classes)
    count = settings.num or (10 if given == range(model.num_classes) else len(given))
    return [given[k] for k in class_labels(settings.label_rule, count, len(given), settings.seed)]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file. ValueError, with its number, for an empty one: images would be of other prompts than thought."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file {path} can't be read as text: {error}") from None
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ValueError(f"prompts_file must hold a prompt a line, but line {empty[0]} of {path} is empty")
    return tuple(lines)


def _sample_set(settings: Sample) -> str:
    with workers(settings.device) as device:
        model, plan, options = _loaded(replace(settings, device=str(device)))
        labels = _labels(settings, model)
        names = {"model": settings.model, "refiner": settings.refiner, "vae": settings.vae}
        about = {name: Path(value).name if value and Path(value).exists() else value for name, value in names.items()}
        if settings.prompts_file is not None:
            source = settings.prompts_file.name
        else:
            source = "given" if settings.labels or settings.prompts else "all"
        about |= {"label_rule": settings.label_rule, "labels": source}
        del options["output"]
        manifest = generate(model, plan, labels, settings.out, shard_size=settings.shard_size, about=about, **options)
    return f"{_said(settings.out, len(labels), plan)}, {_proved(manifest)}"


def _proved(manifest: Mapping[str, Any]) -> str:
    return f"each once and whole in {len(manifest['shards'])} shards, images_sha256 {manifest['images_sha256']}"


@dataclass(frozen=True)
class Verify:
    """Check a folder of images that sample wrote: each image once and in its place, every byte as it was written."""

    folder: tyro.conf.Positional[Path]
    """The folder."""
    npz: Path | None = None
    """Write all its images as one .npz too, with arr_0 and labels, as ADM's evaluator reads it."""


def run_verify(settings: Verify) -> str:
    manifest = verify(settings.folder) if settings.npz is None else join(settings.folder, settings.npz)
    return f"{settings.npz or settings.folder}: images {manifest['first']} to {manifest['last']}, {_proved(manifest)}"


@dataclass(frozen=True)
class Edit(Model):
    """Change images towards classes: each is mixed with noise and sampled from there."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files (cropped to squares of the model's size, on white where transparent), or one .npz as sample writes it."""
    labels: tuple[int, ...] = ()
    """What to make of them: one class number, or one an image. A model that reads text takes --prompts likewise."""
    strength: float = 0.6
    """Above 0, at most 1: how much of the image is forgotten."""
    out: Path = Path("edited.png")
    """A grid with the images above and what became of them below (.png), or an .npz as sample writes it."""


@dataclass(frozen=True)
class Inpaint(Edit):
    """Make a part of images anew and keep the rest: the part in a mask, in a box, or where an image is transparent."""

    strength: float = 1.0
    """Above 0, at most 1: how much of the part is forgotten."""
    mask: Path | None = None
    """An image file of the images' size, bright (or transparent) where they are to be made anew."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the part, as shares of width and height."""
    out: Path = Path("inpainted.png")
    """A grid with the images above and what became of them below (.png), or an .npz as sample writes it."""


def run_edit(settings: Edit) -> str:
    _check_out(settings.out)
    if not settings.images or not (settings.labels or settings.prompts):
        raise ValueError("images and labels (or prompts) must name at least one each")
    model, plan, options = _loaded(settings)
    given: Sequence[Any] = settings.prompts or settings.labels
    before = _images(settings.images, image_size(model))
    chosen: dict[str, Any] = {"strength": settings.strength, **options}
    if isinstance(settings, Inpaint):
        made = inpaint(model, plan, before, _mask(settings, before), given, **chosen)
    else:
        made = edit(model, plan, before, given, **chosen)
    labels = given if len(given) == len(made) else list(given) * len(made)
    _write(settings.out, made, labels, torch.from_numpy(before).expand(len(made), -1, -1, -1))
    return _said(settings.out, len(made), plan)


def _images(paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    if any(path.suffix == ".npz" for path in paths):
        if len(paths) > 1:
            raise ValueError(f"images must be image files or one .npz, got {len(paths)} files with an .npz among them")
        return read_npz(paths[0])
    return np.stack([read_image(path, size[0]) for path in paths])


def _mask(settings: Inpaint, images: np.ndarray) -> np.ndarray:
    height, width = images.shape[1:3]
    if settings.mask is not None and settings.box is not None:
        raise ValueError("give mask or box, not both")
    if settings.box is not None:
        return box_mask(settings.box, height, width)
    files = [path for path in settings.images if path.suffix != ".npz"]
    if settings.mask is not None:
        if not files:
            raise ValueError("mask must go with image files; for an .npz give box")
        return np.stack([read_mask(settings.mask, height, path) for path in files])
    masks = [read_transparency(path, height) for path in files]
    if not masks or any(mask is None for mask in masks):
        raise ValueError("mask or box must say what to make anew, where images are not transparent there")
    return np.stack([mask for mask in masks if mask is not None])


def dtype_of(name: Dtype | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None
