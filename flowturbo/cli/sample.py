"""sample, edit, inpaint and verify as commands: settings that are flags, files in, files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..models.flow_model import FlowModel
from ..runtime.distributed import workers
from ..sampling.generate import LabelRule, class_labels, generate
from ..sampling.sampler import sample
from ..storage.image_shards import join, verify
from .options import ModelFlags, load_model
from .output import check_out, summary_line, write_images


@dataclass(frozen=True)
class Sample(ModelFlags):
    """Sample images by a plan. With no arguments: ten digits by the bundled model, as
    samples.png.
    """

    labels: tuple[int, ...] | None = None
    """Class numbers; left out: all of the model's."""
    prompts_file: Path | None = None
    """A text file with a prompt a line, in the place of --prompts."""
    label_rule: LabelRule = "cycle"
    """Image i gets: "cycle": of the labels or prompts number i, from the first again after the
    last; "random": one drawn from (seed, i)."""
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-fid-samples"])] = None
    """How many images; left out: one of each label or prompt, and ten where --labels says
    nothing.
    """
    out: Annotated[Path, tyro.conf.arg(aliases=["--sample-dir"])] = Path("samples.png")
    """A labelled grid (.png; the image itself where a prompt makes one); an .npz with arr_0 (N,
    height, width, 3), uint8, and labels; or, without a suffix, a folder of such files, with a
    manifest: for large sets, also under torchrun, which go on from what is there."""
    shard_size: int | None = None
    """Images a file of a folder, a multiple of --batch-size; left out: the first from 256 on
    (--batch-size is then 64).
    """


def run_sample(settings: Sample) -> str:
    if settings.num is not None and settings.num < 1:
        raise ValueError(f"num must be at least 1, got {settings.num}")
    if settings.prompts_file is not None:
        if settings.prompts:
            raise ValueError("give prompts or prompts_file, not both")
        settings = replace(settings, prompts=read_prompts(settings.prompts_file))
    if (
        settings.out.is_dir() or settings.out.suffix[1:].isdigit() or not settings.out.suffix
    ):  # a folder may be called cfg1.5
        return _sample_set(settings)
    check_out(settings.out)
    model, plan, options = load_model(settings)
    labels = _labels(settings, model)
    write_images(settings.out, sample(model, plan, labels, **options), labels)
    return summary_line(settings.out, len(labels), plan)


def _labels(settings: Sample, model: FlowModel) -> list[Any]:
    given: Sequence[Any] = settings.prompts or settings.labels or range(model.num_classes)
    count = settings.num or (10 if given == range(model.num_classes) else len(given))
    return [given[k] for k in class_labels(settings.label_rule, count, len(given), settings.seed)]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file. ValueError, with its number, for an empty one: images would be of
    other prompts than thought.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file {path} can't be read as text: {error}") from None
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ValueError(
            f"prompts_file must hold a prompt a line, but line {empty[0]} of {path} is empty"
        )
    return tuple(lines)


def _sample_set(settings: Sample) -> str:
    with workers(settings.device) as device:
        model, plan, options = load_model(replace(settings, device=str(device)))
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
            about=about,
            **options,
        )
    return f"{summary_line(settings.out, len(labels), plan)}, {_proved(manifest)}"


def _proved(manifest: Mapping[str, Any]) -> str:
    return (
        f"each once and whole in {len(manifest['shards'])} shards, images_sha256 "
        f"{manifest['images_sha256']}"
    )


@dataclass(frozen=True)
class Verify:
    """Check a folder of images that sample wrote: each image once and in its place, every byte as
    it was written.
    """

    folder: tyro.conf.Positional[Path]
    """The folder."""
    npz: Path | None = None
    """Write all its images as one .npz too, with arr_0 and labels, as ADM's evaluator reads it."""


def run_verify(settings: Verify) -> str:
    manifest = (
        verify(settings.folder) if settings.npz is None else join(settings.folder, settings.npz)
    )
    return (
        f"{settings.npz or settings.folder}: images {manifest['first']} to {manifest['last']}, "
        f"{_proved(manifest)}"
    )
