"""`flowturbo train` and `flowturbo distill`: training a predictor, and a refiner for one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from ..checks import listed
from ..data.latents import Data, load_data, needs_vae
from ..data.prompt_latents import load_prompts
from ..models.checkpoint import save_sit
from ..models.class_names import usable_names
from ..models.diffusers_io import WEIGHTS, write_pretrained
from ..models.model_plans import find_unstaged
from ..models.pipelines import is_pipeline, load_pipeline, move_part, network_with_prompts
from ..models.sit import SIT_CONFIGS, SiT, SiTConfig
from ..models.text_to_image import Conditions, PromptNetwork, refiner_for
from ..models.vae import check_named_vae, load_vae
from ..runtime.distributed import workers
from ..runtime.modes import own_modes
from ..runtime.rng import stream
from .objectives import FlowMatching, Objective, Refinement, Times
from .plan_refinement import PlanRefinement
from .settings import Settings, changed, refuse_unused
from .trainer import Weights, run_training


@dataclass(frozen=True)
class Train(Settings):
    """Train a predictor by flow matching. The defaults are SiT's."""

    model: str = "SiT-B/2"
    """A published size such as "SiT-XL/2", or "custom" with the four sizes below."""
    hidden: int = 384
    """Hidden size, for --model custom."""
    depth: int = 12
    """Number of blocks, for --model custom."""
    heads: int = 6
    """Number of attention heads, for --model custom."""
    patch: int = 2
    """Patch size, for --model custom."""
    times: Literal["uniform", "logit-normal"] = "uniform"
    """Distribution of the times t of the rows.
    "logit-normal" trains more where the velocity is hard to predict, as SD3 was.
    """
    times_mean: float = 0.0
    """Mean of logit t with --times logit-normal; below 0 is nearer to noise."""
    times_std: float = 1.0
    """Standard deviation of logit t."""
    times_uniform: float = 0.0
    """Share of rows whose times are uniform with --times logit-normal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times not in ("uniform", "logit-normal"):
            raise ValueError(f"times must be uniform or logit-normal, got {self.times!r}")
        if not math.isfinite(self.times_mean):
            raise ValueError(f"times_mean must be finite, got {self.times_mean}")
        if not 0 < self.times_std < math.inf:
            raise ValueError(f"times_std must be above 0, got {self.times_std}")
        if not 0 <= self.times_uniform <= 1:
            raise ValueError(f"times_uniform must be from 0 to 1, got {self.times_uniform}")
        refuse_unused(self, "times", "logit-normal", "times_mean", "times_std", "times_uniform")

    def config(self, data: Data) -> SiTConfig:
        """The network's configuration for latents like these; ValueError if they do not fit it."""
        channels, height, width = data.shape
        if height != width:
            raise ValueError(f"data must have square latents, got {height} x {width}")
        if self.model != "custom" and self.model not in SIT_CONFIGS:
            raise ValueError(
                f"model must be 'custom' or one of {', '.join(SIT_CONFIGS)}, got {self.model!r}"
            )
        custom = SiTConfig(
            hidden=self.hidden, depth=self.depth, heads=self.heads, patch=self.patch, side=height
        )
        return replace(
            SIT_CONFIGS.get(self.model, custom),
            side=height,
            channels=channels,
            num_classes=data.num_classes,
            learned_sigma=False,
            sides=_sides(self.sides, height),
        )


@dataclass(frozen=True, kw_only=True)
class Distill(Settings):
    """Train a refiner for a frozen predictor.

    The defaults are the objective and the hyperparameters of FlowTurbo's public code.
    """

    teacher: str
    """The predictor's file, or "digits".
    Or the folder or hub name of a text-to-image pipeline: 2-RF, SD3 or FLUX.
    With a pipeline, --data must be a folder from `flowturbo encode --model`.
    """
    heads: int | None = None
    """The teacher's attention heads, if its width is not a published one."""
    convention: Literal["auto", "sit", "repa", "2-rf"] = "auto"
    """"repa" for a teacher whose time runs backwards, "2-rf" for a pipeline with 2-RF's UNet."""
    depth: int = 1
    """Number of blocks of the refiner."""
    steps: int = 30_000
    """Total number of updates."""
    batch_size: int = 18
    """Rows per update, summed over all processes."""
    lr: float = 5e-5
    """Learning rate of AdamW."""
    delta_max: float = 0.12
    """Largest time difference delta between the cached velocity and the refined one."""
    inside: bool = False
    """Keep t + delta at most 1. The public code lets it exceed 1."""
    delta_per_row: bool = False
    """Draw delta for each row. The public code draws one per batch."""
    plans: tuple[str, ...] = ()
    """Train at the states where these plans call the refiner, on their way from noise with the
    refiner as it is, guided as --guidance says; of the data only the labels are used.
    Instead of --delta-max and the options below it. Such as H1P5R3, a .json file, or the name of a
    plan in the teacher's file.
    """
    drop_before: bool = False
    """Drop the label for the cached velocity too, as in the paper.
    The public code always gives it the true label.
    """
    guidance: tuple[float, float] = (1.0, 1.0)
    """Range of the guidance scale of the cached velocity, drawn uniformly for each row.
    The public code has no guidance, which is 1 1.
    For FLUX.1-dev: range of the scale that both networks take as input.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.plans, str):
            raise TypeError(f"plans must be a list of texts, got {self.plans!r}")
        object.__setattr__(self, "plans", tuple(self.plans))
        of_paths = changed(self, "delta_max", "inside", "delta_per_row", "drop_before")
        if self.plans and of_paths:
            raise ValueError(
                f"plans say at which times to train: leave out {' and '.join(of_paths)}, got "
                f"{', '.join(str(getattr(self, n)) for n in of_paths)}"
            )
        if not 0 < self.delta_max < 1:
            raise ValueError(f"delta_max must be above 0 and below 1, got {self.delta_max}")
        if not 1 <= self.guidance[0] <= self.guidance[1] < math.inf:
            raise ValueError(
                f"guidance must be (low, high) with 1 <= low <= high, got {self.guidance}"
            )


@own_modes()
def train(settings: Train) -> Path:
    """Train a predictor; returns the path of its EMA weights.

    ValueError for settings that do not fit the data or an earlier run in the same folder,
    FloatingPointError if the loss is not finite.
    """
    with workers(settings.device) as device:
        data = _data(settings, device)
        config = settings.config(data)
        if settings.vae is not None:
            check_named_vae(settings.vae, config.channels)
        network = _untrained(config, settings.seed)
        times = (
            Times(settings.times_mean, settings.times_std, settings.times_uniform)
            if settings.times == "logit-normal"
            else Times()
        )
        objective = FlowMatching(config.num_classes, settings.label_drop, times)
        # Held-out losses are of uniform times, so that trainings with others can be compared.
        judged = _held_out(settings, data, replace(objective, times=Times()))
        weights = _weights(usable_names(data.class_names, data.num_classes))
        return run_training(network, objective, data, settings, device, weights, judged)


@own_modes()
def distill(settings: Distill) -> Path:
    """Train a refiner for a frozen predictor; returns the path of its EMA weights.

    For a text-to-image teacher they lie next to a config.json, as diffusers loads them. Errors are
    those of `train`.
    """
    prompted = is_pipeline(settings.teacher)
    with workers(settings.device) as device:
        parts = (_for_prompts if prompted else _for_classes)(settings, device)
        network, objective, data, weights = parts
        judged = _held_out(settings, data, objective)
        return run_training(network, objective, data, settings, device, weights, judged)


_Parts = tuple[nn.Module, Objective, Data, Weights]


def _for_classes(settings: Distill, device: torch.device) -> _Parts:
    from ..models.load import load

    if settings.convention == "2-rf":
        raise ValueError("convention='2-rf' is for a text-to-image pipeline as teacher")
    data = _data(settings, device)
    teacher = load(
        settings.teacher,
        heads=settings.heads,
        device=device,
        dtype=torch.float32,
        convention=settings.convention,
    )
    if teacher.latent_shape != data.shape or teacher.num_classes < data.num_classes:
        raise ValueError(
            f"data has latents {data.shape} of {data.num_classes} classes, the teacher wants "
            f"{teacher.latent_shape} "
            f"of {teacher.num_classes}"
        )
    _check_names("data", data, "the teacher", teacher.class_names)
    names = teacher.class_names or usable_names(data.class_names, teacher.num_classes)
    weights = _weights(names)
    if teacher.null_class is None and (settings.label_drop or settings.guidance != (1.0, 1.0)):
        raise ValueError(
            "label_drop must be 0 and guidance 1 1 for a teacher without a null class, got "
            f"{settings.label_drop} and {settings.guidance}"
        )
    sides = _sides(settings.sides, data.shape[-1])
    if unknown := [side for side in sides if side not in teacher.sides]:
        raise ValueError(
            f"sides must be of those that the teacher was trained at, {listed(teacher.sides)}, got "
            f"{unknown[0]}"
        )
    config = replace(_teacher_config(teacher.predictor).refiner(settings.depth), sides=sides)
    network = _untrained(config, settings.seed)
    if settings.plans:
        plans = tuple(find_unstaged(text, teacher.plans) for text in settings.plans)
        return (
            network,
            PlanRefinement(
                teacher, plans, settings.guidance, teacher.guidance_channels, settings.label_drop
            ),
            data,
            weights,
        )
    return (
        network,
        # Without a null class no label is dropped, and the number not used.
        _refinement(settings, teacher.predictor, config.num_classes, teacher.guidance_channels),
        data,
        weights,
    )


def _for_prompts(settings: Distill, device: torch.device) -> _Parts:
    for name in ("plans", "sides", "held_out"):
        if getattr(settings, name):
            raise ValueError(f"{name} must be left out for a pipeline: it is for models of classes")
    data = load_prompts(settings.data)
    pipe = load_pipeline(settings.teacher, ("network",))
    predictor = network_with_prompts(pipe, settings.convention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seeded(settings.seed).initial_seed())
        refiner = refiner_for(predictor.module, settings.depth)
    move_part(predictor, device, torch.float32)
    predictor.eval().requires_grad_(False)
    if predictor.channels != data.shape[0]:
        raise ValueError(
            f"data has latents of {data.shape[0]} channels, the teacher wants {predictor.channels}"
        )
    null = {name: value.to(device) for name, value in data.null.items()}
    embedded = predictor.kind.guidance(predictor.module, pipe) == "embedded"
    return (
        PromptNetwork(refiner),
        _refinement(settings, predictor, null, data.shape[0], embedded=embedded),
        data,
        _PROMPTED,
    )


def _refinement(
    settings: Distill, teacher: Any, null: int | Conditions, channels: int, embedded: bool = False
) -> Refinement:
    return Refinement(
        teacher,
        null,
        channels,
        label_drop=settings.label_drop,
        delta_max=settings.delta_max,
        inside=settings.inside,
        delta_per_row=settings.delta_per_row,
        drop_before=settings.drop_before,
        guidance=settings.guidance,
        embedded=embedded,
    )


def _data(settings: Settings, device: torch.device) -> Data:
    vae = (
        load_vae(settings.vae, device, torch.float32)
        if settings.vae and needs_vae(settings.data)
        else None
    )
    return load_data(settings.data, vae=vae, image_size=settings.image_size)


def _sides(sides: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Further sides to train on; ValueError for one that does not divide the data's."""
    for other in sides:
        if not 0 < other < side or side % other:
            raise ValueError(f"sides must be divisors of the data's side {side}, got {other}")
    return sides


def _held_out(
    settings: Settings, data: Data, objective: Objective
) -> tuple[Data, Objective] | None:
    """The held-out data, if the settings name any, with the objective; ValueError for other shapes
    or more classes than the data's.
    """
    if settings.held_out is None:
        return None
    held_out = None if needs_vae(settings.held_out) else load_data(settings.held_out)
    if held_out is None or held_out.shape != data.shape or held_out.num_classes > data.num_classes:
        found = "images" if held_out is None else f"{held_out.shape} of {held_out.num_classes}"
        raise ValueError(
            f"held_out must be latents like data's, {data.shape} of {data.num_classes} classes, "
            f"got {found}"
        )
    _check_names("held_out", held_out, "data", data.class_names)
    return held_out, objective


def _check_names(what: str, data: Data, whose: str, names: Sequence[str] | None) -> None:
    """ValueError if a class that both name has another number in the data."""
    numbers = {name: number for number, name in enumerate(names or ())}
    for number, name in enumerate(usable_names(data.class_names, data.num_classes) or ()):
        if (other := numbers.get(name, number)) != number:
            raise ValueError(
                f"{what} must number the classes as {whose} does, where {name!r} is {other}, got "
                f"{number}"
            )


def _weights(class_names: Sequence[str] | None) -> Weights:
    """How the weights of a SiT are written. class_names: of all its classes."""

    def save(settings: Settings, network: nn.Module, provenance: Mapping[str, Any]) -> None:
        save_sit(
            settings.out / "model.safetensors",
            cast(SiT, network),
            vae=settings.vae,
            provenance=provenance,
            class_names=class_names,
        )

    return Weights("model.safetensors", save)


def _save_prompted(settings: Settings, network: nn.Module, provenance: Mapping[str, Any]) -> None:
    write_pretrained(settings.out, cast(PromptNetwork, network).module, provenance)


_PROMPTED = Weights(WEIGHTS, _save_prompted)


def _untrained(config: SiTConfig, seed: int) -> SiT:
    with torch.random.fork_rng(devices=[]):  # layers draw weights before these are set
        network = SiT(config)
    return network.float().reset_parameters(_seeded(seed))


def _seeded(seed: int) -> torch.Generator:
    """The generator of initial weights, on a lane of its own: step draws never share its stream."""
    return torch.Generator("cpu").manual_seed(int(stream(seed, 0, lane=2**61).integers(2**62)))


def _teacher_config(predictor: Any) -> SiTConfig:
    """The configuration of a SiT, or of the SiT inside `ReversedTime`."""
    return cast(SiT, getattr(predictor, "network", predictor)).config
