"""`flowturbo sample` and `flowturbo verify`: images, sets of images, and their check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..checks import listed
from ..models.flow_model import FlowModel
from ..runtime.distributed import workers
from ..sampling.generate import LabelRule, NotFinite, class_labels, generate
from ..sampling.sampler import sample
from ..storage.image_shards import join, verify
from ..storage.text import TextError, read_lines
from .options import ModelFlags, load_model_and_stages
from .output import check_out, names_a_folder, summary_line, write_images


@dataclass(frozen=True)
class Sample(ModelFlags):
    """Sample images by a plan.

    Without arguments it samples an emoji of each class from the bundled model and writes
    samples.png.
    """

    labels: tuple[int | str, ...] = ()
    """Class numbers, or names if the model's file has them. Default: all classes of the model."""
    prompts_file: Path | None = None
    """A text file with one prompt per line, instead of --prompts."""
    label_rule: LabelRule = "cycle"
    """"cycle" takes the labels or prompts in turn.
    "random" draws that of image i as a function of (seed, i).
    """
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-fid-samples"])] = None
    """Number of images. Default: one per label or prompt; without either one per class, or ten if
    there are more than 64."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--sample-dir"])] = Path("samples.png")
    """A .png gets a labelled grid; a single image of a prompt is written as it is.
    An .npz gets arr_0 (N, height, width, 3) uint8, labels, and class_names if there are any.
    A path without a suffix is a folder of such files with a manifest, for large sets.
    Folders also work under torchrun, and an interrupted run resumes from its folder.
    """
    shard_size: int | None = None
    """Images per file of a folder, a multiple of --batch-size, which is then 64 by default.
    Default: the least multiple from 256 on.
    """
    enlarge: Literal["latents", "pixels"] = "latents"
    """Where a plan with stages enlarges images: in the latents, or decoded."""
    not_finite: NotFinite = "stop"
    """Of a folder: what to do about images with NaN or infinity, as when a model overflows.
    "stop" names them and ends; "mark" makes them magenta and lists them in the manifest.
    """


def run_sample(settings: Sample) -> str:
    """Sample and write the images; returns a summary line."""
    if settings.num is not None and settings.num < 1:
        raise ValueError(f"num must be at least 1, got {settings.num}")
    if settings.prompts_file is not None:
        if settings.prompts:
            raise ValueError("give prompts or prompts_file, not both")
        settings = replace(settings, prompts=read_prompts(settings.prompts_file))
    if settings.out.is_dir() or names_a_folder(settings.out):
        return _sample_set(settings)
    check_out(settings.out)
    if settings.not_finite != "stop":
        raise ValueError(
            f"not_finite {settings.not_finite!r} is for a folder, but out is {settings.out}"
        )
    model, plan, options = load_model_and_stages(settings)
    labels = _labels(settings, model)
    images = sample(model, plan, labels, enlarge=settings.enlarge, **options)
    write_images(settings.out, images, labels, model.class_names)
    return summary_line(settings.out, len(labels), plan)


_ALL = 64
"""Classes of which one image each is made without labels; of more classes only the first ten."""


def _labels(settings: Sample, model: FlowModel) -> list[Any]:
    """The label or prompt of each image."""
    given = settings.labels and model.numbered(settings.labels)
    choices: Sequence[Any] = settings.prompts or given or range(model.num_classes)
    count = settings.num or (len(choices) if len(choices) <= _ALL else 10)
    indices = class_labels(settings.label_rule, count, len(choices), settings.seed)
    return [choices[k] for k in indices]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file, one prompt each, in UTF-8, or UTF-16 with a mark.

    ValueError for an empty line: skipping it would shift the prompts against the images.
    """
    try:
        lines = read_lines(path)
    except TextError as error:
        raise ValueError(f"prompts_file {error}") from None
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ValueError(
            f"prompts_file must hold a prompt a line, but line {empty[0]} of {path} is empty"
        )
    return tuple(lines)


def _sample_set(settings: Sample) -> str:
    with workers(settings.device) as device:
        model, plan, options = load_model_and_stages(replace(settings, device=str(device)))
        labels = _labels(settings, model)
        names = {"model": settings.model, "refiner": settings.refiner, "vae": settings.vae}
        about = {
            name: Path(value).name if value and Path(value).exists() else value
            for name, value in names.items()
        }
        if settings.prompts_file is not None:
            source = settings.prompts_file.name
        else:
            source = "given" if settings.labels or settings.prompts else "all"
        about |= {"label_rule": settings.label_rule, "labels": source}
        del options["output"]
        manifest = generate(
            model,
            plan,
            labels,
            settings.out,
            shard_size=settings.shard_size,
            enlarge=settings.enlarge,
            about=about,
            not_finite=settings.not_finite,
            **options,
        )
    return f"{summary_line(settings.out, len(labels), plan)}, {_manifest_summary(manifest)}"


def _manifest_summary(manifest: Mapping[str, Any]) -> str:
    marked = manifest.get("not_finite", [])
    return (
        f"complete in {len(manifest['shards'])} shards, images_sha256 {manifest['images_sha256']}"
        + (f"; {len(marked)} images are marked as not finite: {listed(marked)}" if marked else "")
    )


@dataclass(frozen=True)
class Verify:
    """Verify a folder that `flowturbo sample` wrote against its manifest.

    Each image must be there once, in its place, with the bytes that were written.
    """

    folder: tyro.conf.Positional[Path]
    """The folder of images."""
    npz: Path | None = None
    """Also write all images to one .npz with arr_0 and labels, as ADM's evaluator reads it."""


def run_verify(settings: Verify) -> str:
    """Verify a folder, and join it into one .npz on request; returns a summary line."""
    manifest = (
        verify(settings.folder) if settings.npz is None else join(settings.folder, settings.npz)
    )
    return (
        f"{settings.npz or settings.folder}: images {manifest['first']} to {manifest['last']}, "
        f"{_manifest_summary(manifest)}"
    )
