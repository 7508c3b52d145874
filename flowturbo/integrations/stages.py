"""sample_stages(): plans with stages inside diffusers pipelines, which are called once a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.pipelines import from_pipeline
from ..models.prompt_kind import type_name
from ..models.text_to_image import PromptModel, packed, unpacked
from ..sampling.enlarge import Enlarge, Enlarger, coarse_noise, enlarger, taken_over
from ..sampling.run import both_ends
from ..sampling.stages import Leg, batch_sizes, model_legs
from ..solver.plan import Plan, as_plan
from ..solver.stages import StagedPlan, as_stages
from .diffusers import accelerated
from .known_pipelines import check_steps
from .patches import Patch
from .planned_pipeline import MARK


@torch.no_grad()
def sample_stages(
    pipe: Any,
    plan: str | Plan | StagedPlan,
    *,
    enlarge: Enlarge = "latents",
    batch_size: int | Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Call a diffusers pipeline once for each stage of a plan -> what its last call returns.

    pipe: a text-to-image pipeline that `from_pipeline` takes. It is accelerated for the call; with
        `accelerate(pipe, ..., graph=True)` before it keeps a CUDA graph for each stage, and with a
        refiner before it takes plans with refiner steps.
    plan: a StagedPlan, or text such as "A4 at 1/2 + A3 from 0.6". One stage is `accelerate`, to the
        bit, with the `grid` of an earlier `accelerate` unless the plan's own grid is not uniform.
        For several the noise levels are those of `from_pipeline`.
    enlarge, batch_size: as for `sample`; a batch is of prompts. The last batch is padded to
        batch_size even if it is the only one, so that an image has the same bits in any company.
    options: the arguments of the pipeline: prompt, height, width, guidance_scale, generator,
        output_type and so on. Texts are encoded once. `latents`, or the noise that the generator
        gives, are for the finished size; small stages start from its low frequencies.
    Not for several threads at once. Raises ValueError or TypeError for arguments that do not fit,
    for a pipeline that takes images, and before the first call for a plan that the pipeline can't
    run: one that calls the network at noise level 0 where the pipeline divides by the level, one
    with refiner steps for a pipeline without a refiner, and one with a guidance interval.
    """
    plan = as_stages(plan)
    _check_plan(pipe, plan)
    if isinstance(plan, Plan):
        if batch_size is not None:
            raise ValueError(
                f"batch_size must be left out for plan {plan}, which has one stage, got "
                f"{batch_size!r}"
            )
        with (
            _scheduler_of(pipe, plan) as scheduler,
            _at(scheduler, plan, _grid_for(scheduler, plan)),
        ):
            return pipe(**options)
    _check(pipe, options)
    height, width = options.pop("height", None), options.pop("width", None)
    model = _described(pipe, None if height is None else (height, width))
    legs = model_legs(model, plan)
    enlarging = enlarger(enlarge, model.vae, len(legs))
    sizes = batch_sizes(batch_size, len(legs))
    rows = _Rows(options)
    noise = _noise(pipe, model, rows.count, options)
    with _scheduler_of(pipe, as_plan(plan.stages[-1].plan)) as scheduler, ExitStack() as stack:
        encode = stack.enter_context(_encoding_once(pipe))
        call = _Call(pipe, scheduler, model, options, rows, encode)
        return _run(call, legs, sizes, noise, enlarging)


_PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
"""Networks whose pipelines keep latents as tokens of 2 x 2."""
_KNOWN = (*_PACKED, "SD3Transformer2DModel", "ZImageTransformer2DModel")


def _check_plan(pipe: Any, plan: Plan | StagedPlan) -> None:
    """Raise ValueError for a plan of which the pipeline can't run every stage."""
    state = getattr(pipe, MARK, None)
    if state is not None and pipe.scheduler is not state.scheduler:
        raise ValueError(
            "pipe must keep the scheduler that accelerate gave it, but has another "
            f"{type(pipe.scheduler).__name__}: restore the pipeline first"
        )
    if plan.cost.refiner and (state is None or state.scheduler.refiner is None):
        raise ValueError(
            f"plan {plan} has refiner steps, for which pipe must have a refiner: restore it if it "
            "is accelerated, and accelerate it with a plan such as 'H1R1' and a refiner"
        )
    for part in [plan] if isinstance(plan, Plan) else plan.plans:
        if part.guidance_interval != (0.0, 1.0):
            raise ValueError(
                f"plan must have no guidance interval, got {part.guidance_interval} in {part}: a "
                "pipeline guides by itself"
            )
        check_steps(pipe, part)


def _check(pipe: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for what stages can't do."""
    network = type_name(getattr(pipe, "transformer", None))
    if network not in _KNOWN:
        raise TypeError(
            f"pipe must have one of the transformers {', '.join(_KNOWN)} for a plan with stages, "
            f"got {network}"
        )
    images = [name for name in options if "image" in name and name != "num_images_per_prompt"]
    images += [name for name in options if name == "strength"]
    if images:
        raise ValueError(
            f"a plan with stages makes images from prompts alone, got {', '.join(images)}"
        )
    if (options.get("height") is None) != (options.get("width") is None):
        raise ValueError(
            "height and width must be given both or not at all, got "
            f"{options.get('height')} and {options.get('width')}"
        )


class _Rows:
    """The prompts of a call, and how its arguments are cut into batches of them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        given = {
            name: value
            for name, value in options.items()
            if "prompt" in name and isinstance(value, list | tuple | Tensor | str)
        }
        first = given.get("prompt", given.get("prompt_embeds"))
        if first is None:
            raise ValueError("prompt or prompt_embeds must be given")
        self.prompts = 1 if isinstance(first, str) else len(first)
        self.each = int(options.get("num_images_per_prompt") or 1)
        self.count = self.prompts * self.each
        self.cut = [
            name
            for name, value in given.items()
            if not isinstance(value, str) and len(value) == self.prompts
        ]

    def of(self, options: Mapping[str, Any], prompts: Sequence[int]) -> dict[str, Any]:
        """The arguments for these prompts."""
        chosen = dict(options)
        for name in self.cut:
            value = options[name]
            chosen[name] = (
                value[list(prompts)] if isinstance(value, Tensor) else [value[i] for i in prompts]
            )
        return chosen

    def images(self, prompts: Sequence[int]) -> list[int]:
        """The numbers of the images of these prompts."""
        return [self.each * i + k for i in prompts for k in range(self.each)]


class _Call:
    """What every call of the pipeline has in common."""

    def __init__(
        self,
        pipe: Any,
        scheduler: Any,
        model: PromptModel,
        options: Mapping[str, Any],
        rows: _Rows,
        encode: _Encodings,
    ) -> None:
        self.pipe, self.scheduler, self.model = pipe, scheduler, model
        self.options, self.rows, self.encode = options, rows, encode
        self.packs = type_name(pipe.transformer) in _PACKED
        self.factor = model.vae.factor if model.vae is not None else pipe.vae_scale_factor

    def stage(self, leg: Leg, start: Tensor, prompts: Sequence[int]) -> Any:
        """Run one stage on these prompts -> the ends of its latents, or what the pipeline returns.

        start: (n, C, H, W).
        """
        options = self.rows.of(self.options, prompts)
        if not leg.last:
            options |= {"output_type": "latent", "return_dict": True}
        H, W = leg.size
        self.encode.begin(prompts)
        with _at(self.scheduler, leg.plan, "plan", keeps_end=not leg.last):
            result = self.pipe(
                height=H * self.factor,
                width=W * self.factor,
                latents=packed(start) if self.packs else start,
                **options,
            )
            state = self.scheduler.ended
        if leg.last:
            return result
        if state is None:
            raise ValueError(f"the pipeline has not run stage {leg.plan} to its end")
        if self.packs:
            v = unpacked(state.newest_velocity, H, W)
            state = state._replace(x=unpacked(state.x, H, W), v=v)
        return both_ends(state, leg.plan.end)


def _run(
    call: _Call, legs: Sequence[Leg], sizes: Sequence[int | None], noise: Tensor, enlarge: Enlarger
) -> Any:
    """Run the stages, each on all prompts, batch by batch."""
    ends: Tensor | None = None
    results: list[Any] = []
    for number, (leg, size) in enumerate(zip(legs, sizes, strict=True)):
        results, total = [], call.rows.prompts
        size = total if size is None else size
        for first in range(0, total, size):
            # The last batch is padded with its last prompt, as in `sample`.
            prompts = [min(i, total - 1) for i in range(first, first + size)]
            images = call.rows.images(prompts)
            start = coarse_noise(noise[images], leg.size)
            if ends is not None:
                levels = 1 - legs[number - 1].plan.end, 1 - leg.plan.start
                start = taken_over(ends[images], start, enlarge, *levels, number)
            result = call.stage(leg, start, prompts)
            kept = min(size, total - first) * call.rows.each
            results.append((result, kept))
        if not leg.last:
            ends = torch.cat([result[:kept] for result, kept in results])
    return _joined(results)


def _joined(results: Sequence[tuple[Any, int]]) -> Any:
    """One result of the pipeline for all batches; each holds `kept` images and padding."""
    result = results[0][0]
    lists = [(r[0] if isinstance(r, tuple) else r.images)[:kept] for r, kept in results]
    images: Any
    if isinstance(lists[0], Tensor):
        images = torch.cat(lists)
    elif isinstance(lists[0], np.ndarray):
        images = np.concatenate(lists)
    else:
        images = [image for part in lists for image in part]
    if isinstance(result, tuple):
        return (images, *result[1:])
    return type(result)(images=images)


def _described(pipe: Any, size: tuple[int, int] | None) -> PromptModel:
    """The pipeline as a model, of which only the description is used: the pipeline stays as it is,
    in training and with gradients if it is so.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    training = [(module, module.training) for part in modules for module in part.modules()]
    gradients = [(p, p.requires_grad) for part in modules for p in part.parameters()]
    try:
        return from_pipeline(pipe, image_size=size)
    finally:
        for module, value in training:
            module.training = value
        for parameter, value in gradients:
            parameter.requires_grad_(value)


def _noise(pipe: Any, model: PromptModel, count: int, options: dict[str, Any]) -> Tensor:
    """The noise at the finished size, (count, C, H, W): as given, or as the pipeline draws it."""
    from diffusers.utils.torch_utils import randn_tensor

    generator, latents = options.pop("generator", None), options.pop("latents", None)
    device = getattr(pipe, "_execution_device", model.device)
    shape = (count, *model.latent_shape)
    if latents is None:
        dtype = _dtype(pipe, options)
        latents = randn_tensor(shape, generator, device, dtype)
    C, H, W = model.latent_shape
    if tuple(latents.shape) == (count, H * W // 4, 4 * C):
        latents = unpacked(latents, H, W)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
    return latents.to(device, torch.promote_types(latents.dtype, torch.float32))


def _dtype(pipe: Any, options: Mapping[str, Any]) -> torch.dtype:
    """In which the pipeline draws its noise."""
    if type_name(pipe.transformer) == "ZImageTransformer2DModel":
        return torch.float32
    embeds = options.get("prompt_embeds")
    return embeds.dtype if isinstance(embeds, Tensor) else pipe.transformer.dtype


@contextmanager
def _scheduler_of(pipe: Any, plan: Plan) -> Iterator[Any]:
    """The scheduler of the pipeline, which is accelerated meanwhile if it is not yet."""
    state = getattr(pipe, MARK, None)
    if state is not None:
        yield state.scheduler
        return
    with accelerated(pipe, plan):
        yield getattr(pipe, MARK).scheduler


@contextmanager
def _at(scheduler: Any, plan: Plan, grid: str, keeps_end: bool = False) -> Iterator[None]:
    """The scheduler with another plan, of which it keeps the end if asked to."""
    before = scheduler.plan, scheduler.grid
    scheduler.plan, scheduler.grid, scheduler.keeps_end = plan, grid, keeps_end
    try:
        yield
    finally:
        scheduler.plan, scheduler.grid = before
        scheduler.ended = None  # latents, which no one needs any more
        del scheduler.keeps_end


def _grid_for(scheduler: Any, plan: Plan) -> str:
    """The kind of grid for another plan: its own, or the one that `accelerate` was asked for."""
    from .scheduler import PlanScheduler

    default, asked = PlanScheduler.of(scheduler.stock, plan).grid, scheduler.config["_grid"]
    return default if default == "plan" or asked == "auto" else asked


class _Encodings:
    """What a pipeline's encode_prompt has returned, call by call, for each batch of prompts."""

    def __init__(self, encode: Any) -> None:
        self._encode, self._active = encode, True
        self._known: dict[tuple[int, ...], list[Any]] = {}
        self._present: list[Any] = []
        self._next = 0

    def begin(self, prompts: Sequence[int]) -> None:
        """The pipeline is called with these prompts."""
        self._present, self._next = self._known.setdefault(tuple(prompts), []), 0

    def switch_off(self) -> None:
        """Pass all calls through from now on."""
        self._active = False
        self._known, self._present = {}, []

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self._active:
            return self._encode(*args, **options)
        if self._next == len(self._present):
            self._present.append(self._encode(*args, **options))
        self._next += 1
        return self._present[self._next - 1]


@contextmanager
def _encoding_once(pipe: Any) -> Iterator[_Encodings]:
    """Texts are encoded in the first stage; later ones get the same encodings."""
    encodings = _Encodings(pipe.encode_prompt)
    undo = Patch(pipe, "encode_prompt", encodings)
    try:
        yield encodings
    finally:
        undo()
