"""Large sets of images, by one process or many: the same set whoever makes which part of it,
through any kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..checks import natural, positive
from ..models.flow_model import FlowModel
from ..models.sit import SiT
from ..models.text_to_image import PromptModel, PromptNetwork, config_of
from ..runtime import rng
from ..runtime.device import device_name
from ..runtime.distributed import Team
from ..solver.plan import Plan, as_plan
from ..storage.files import Lock
from ..storage.image_shards import (
    MANIFEST,
    Shard,
    count_images,
    cut,
    missing_shards,
    remove_partial_shards,
    save_shard,
    write_manifest,
)
from ..storage.resume import difference
from ..version import __version__
from .run import Job
from .sampler import sample

LabelRule = Literal["cycle", "random"]
BATCH_SIZE, SHARD_SIZE = 64, 256


def class_labels(rule: LabelRule, num: int, num_classes: int, seed: int) -> np.ndarray:
    """(num,) int64. "cycle": image i is of class i % num_classes, as many of each as can be;
    "random": of a class drawn from (seed, i), uniformly, as published scores of SiT are made."""
    if rule not in get_args(LabelRule):
        raise ValueError(
            f"label_rule must be one of {', '.join(get_args(LabelRule))}, got {rule!r}"
        )
    images = range(positive("num", num))
    return (
        np.arange(num) % num_classes
        if rule == "cycle"
        else rng.random_classes(num_classes, seed, images)
    )


def generate(
    model: FlowModel,
    plan: str | Plan,
    labels: Sequence[int] | Sequence[str] | np.ndarray,
    out: str | os.PathLike[str],
    *,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    negative: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    shard_size: int | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Make the shards that are not there yet, then the manifest, which it returns. The processes of
    a group share the work.

    labels: a class number an image, or a prompt an image for a text-to-image model; their number is
        the number of images. `class_labels` makes them by a rule.
    negative: what to guide away from, for a text-to-image model that is guided by it.
    out: the folder. Shard k is images-0000k-of-0000n.npz, with arr_0 (N, height, width, 3) uint8,
        labels (N,) int64 or texts, and indices (N,) int64, the numbers of its images, and appears
        whole or not at all. Damaged shards are made again.
    batch_size: images at a time, 64 if left out. An image is the same to the last bit in any batch
        of this size.
    shard_size: images a file, a multiple of batch_size; left out: the first from 256 on.
    about: notes for the manifest alone, such as names of files; all else must be as it was when the
    folder was begun. The other arguments are those of `sample`.
    Raises ValueError for a folder of other settings or one that another run is writing,
    RuntimeError in every other process when one ends early; a next call goes on.
    """
    out, plan = Path(out), as_plan(plan, model.shift)
    if plan.start:
        raise ValueError(f"plan must start at 0, got one that starts at {plan.start:g}")
    given = _checked(labels, model)
    told = {} if negative is None else {"negative": _checked_negative(negative, model)}
    size = BATCH_SIZE if batch_size is None else positive("batch_size", batch_size)
    shard_size = (
        -(-SHARD_SIZE // size) * size if shard_size is None else positive("shard_size", shard_size)
    )
    if shard_size % size:
        raise ValueError(f"shard_size must be a multiple of batch_size, {size}, got {shard_size}")
    job = Job.of(model, plan, guidance, guidance_channels, "uint8", torch.float32)
    settings = (
        _settings(model, job, given, guidance, natural("seed", seed), size, shard_size) | told
    )
    shards = cut(len(given), shard_size)

    def made(images: range) -> np.ndarray:
        noise = rng.noise(model.latent_shape, seed, images)
        chosen = given[images.start : images.stop].tolist()
        options: dict[str, Any] = dict(
            guidance=guidance, guidance_channels=guidance_channels, batch_size=size, **told
        )
        return sample(model, plan, chosen, noise=noise, output="uint8", **options).cpu().numpy()

    with Team() as team, _writing(out, team, shards, settings) as missing:
        if missing and model.device.type == "cuda":
            _warm_up(team, lambda: made(range(1)))
        with tqdm(
            total=len(given), disable=None if progress and team.rank == 0 else True, unit="image"
        ) as bar:
            for shard in missing[team.rank :: team.size]:
                parts = []
                for first in shard.images[::size]:
                    parts.append(made(range(first, min(first + size, shard.images.stop))))
                    if not bar.disable:
                        bar.update(count_images(out, shards) + sum(map(len, parts)) - bar.n)
                own = np.array(given[shard.images.start : shard.images.stop].tolist())
                save_shard(out, shard, np.concatenate(parts), own, settings)
            team.barrier()
            bar.update(len(given) - bar.n)
        return team.from_rank0(lambda: write_manifest(out, about))


def _checked(labels: Sequence[int] | Sequence[str] | np.ndarray, model: FlowModel) -> np.ndarray:
    """Class numbers (N,) int64, or texts (N,), as objects: numpy's own are all as wide as the
    longest.
    """
    if isinstance(model, PromptModel):
        texts = model.texts(labels.tolist() if isinstance(labels, np.ndarray) else labels)  # type: ignore[arg-type]
        return np.array(texts, dtype=object)
    classes = np.asarray(labels)
    if classes.ndim != 1 or not len(classes) or classes.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be a list of class numbers, one an image, got shape {classes.shape}, "
            f"{classes.dtype}"
        )
    if classes.min() < 0 or classes.max() >= model.num_classes:
        bad = classes[(classes < 0) | (classes >= model.num_classes)][0]
        raise ValueError(f"labels must be from 0 to {model.num_classes - 1}, got {bad}")
    return classes.astype(np.int64)


def _checked_negative(negative: str, model: FlowModel) -> str:
    if not isinstance(model, PromptModel) or model.guidance_style != "halves":
        raise ValueError(
            "negative is for text-to-image models that are guided by it, which this is not"
        )
    if not isinstance(negative, str):
        raise TypeError(f"negative must be one text, got {type(negative).__name__}")
    return negative


def _settings(
    model: FlowModel,
    job: Job,
    labels: np.ndarray,
    guidance: float,
    seed: int,
    batch_size: int,
    shard_size: int,
) -> dict[str, Any]:
    """All that decides the images to the last bit, and which file they are in."""
    place = model.device
    on_gpu = place.type == "cuda"
    settings = {
        "num": len(labels),
        "labels": hashlib.sha256(json.dumps(labels.tolist()).encode()).hexdigest(),
        "seed": seed,
        "plan": str(job.plan),
        "grid": job.plan.grid,
        "guidance": float(guidance),
        "guidance_channels": job.guidance_channels,
        "guidance_interval": job.plan.guidance_interval,
        "weights": job.plan.weights,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "predictor": _digest(model.predictor),
        "refiner": _digest(model.refiner) if job.plan.cost.refiner else None,
        "vae": _digest(model.vae),
        "text_encoders": _text_digests(model) if isinstance(model, PromptModel) else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "float32_products": job.precision,
        "backend": job.backend,
        "device": device_name(place)
        if on_gpu
        else f"{place.type} {torch.backends.cpu.get_cpu_capability()}",
        "flowturbo": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return json.loads(json.dumps(settings))


def _digest(part: object) -> str | None:
    """Of a network or a VAE as it stands in memory, whatever file it came from."""
    if part is None:
        return None
    hashed = hashlib.sha256(
        (
            f"{type(part).__name__} {getattr(part, 'scale', None)} {getattr(part, 'shift', None)}"
        ).encode()
    )
    network = part if isinstance(part, nn.Module) else getattr(part, "network", None)
    if isinstance(network, nn.Module):
        hashed.update("".join(map(_config, network.modules())).encode())
        for name, value in sorted(network.state_dict().items()):
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return hashed.hexdigest()


def _config(module: nn.Module) -> str:
    """What a network of ours, or of diffusers, was made by and its weights don't show, but no names
    of files.
    """
    if isinstance(module, SiT):
        return str(module.config)
    if isinstance(module, PromptNetwork):
        return str(sorted(config_of(module.module).items()))
    return ""


def _text_digests(model: PromptModel) -> dict[str, str | None]:
    """Of the networks and the vocabularies that make conditions of prompts."""
    found: dict[str, str | None] = {}
    for name, part in sorted(model.pipe.components.items()):
        if name.startswith("text_encoder"):
            found[name] = _digest(part)
        elif name.startswith("tokenizer") and part is not None:
            found[name] = hashlib.sha256(str(sorted(part.get_vocab().items())).encode()).hexdigest()
    return found


@contextlib.contextmanager
def _writing(
    out: Path, team: Team, shards: list[Shard], settings: dict[str, Any]
) -> Iterator[list[Shard]]:
    """The shards to make, and the folder for this run alone as long as the block lasts, or a
    process of the team lives.
    """
    busy = f"another run is writing to out {out}: wait for its end"
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[dict[str, Any], list[Shard]]:
            if out.exists() and not out.is_dir():
                raise ValueError(f"out must be a folder, but {out} is a file")
            out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(contextlib.closing(Lock(out / ".lock")))
            if not lock.take(alone=True):
                raise ValueError(busy)
            missing = missing_shards(out, shards, settings)
            if missing:
                (out / MANIFEST).unlink(missing_ok=True)
            remove_partial_shards(out)
            if not lock.take(alone=False):  # the others join
                raise ValueError(busy)
            return settings, missing

        agreed, missing = team.from_rank0(begin)
        if changed := difference(agreed, settings):
            raise ValueError(f"process {team.rank} is not as process 0: {changed}")
        if team.rank and not stack.enter_context(contextlib.closing(Lock(out / ".lock"))).take(
            alone=False
        ):
            raise ValueError(busy)
        yield missing


def _warm_up(team: Team, run: Callable[[], object]) -> None:
    """On CUDA the first run measures which kernels are fastest, and remembers it on the disk; the
    second is captured; all further ones replay. Process 0 goes first, so that all run the same
    kernels, and every image of the set is made by a replay."""

    def twice() -> None:
        run()
        run()

    team.from_rank0(twice)
    if team.rank:
        twice()
