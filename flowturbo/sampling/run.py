"""The run of one batch: all steps of a plan, eager or replayed from a capture.

`integrate` is the only loop over steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowturbo_kernels import requested_backend, use_backend

from ..checks import finite, positive
from ..models.flow_model import AdaptiveNetwork, FlowModel
from ..models.normalised_vae import Flux2VAE, VideoVAE
from ..models.not_finite import pack, unpack
from ..models.text_to_image import PromptNetwork
from ..models.vae import DiffusersVAE, Pixels
from ..runtime.cuda_graphs import Key
from ..runtime.modes import without_autocast
from ..solver.path import denoised, noise_estimate, on_path
from ..solver.plan import Plan
from ..solver.steps import Field, State
from .velocity_field import field_of

_CAPTURABLE = AdaptiveNetwork | PromptNetwork | Pixels | DiffusersVAE | Flux2VAE | VideoVAE
"""Parts of a model whose work does not depend on the values of their inputs."""


class StepInfo(NamedTuple):
    """What a callback gets after each step.

    step: the number of steps done, of `steps`.
    t: the time reached.
    first: the number of the first image of this batch.
    x: its latents (n, C, H, W).
    denoised: x + (1 - t) * v, like x: the data that x is heading for, a preview that costs no call.
    """

    step: int
    steps: int
    t: float
    first: int
    x: Tensor
    denoised: Tensor


Callback = Callable[[StepInfo], object]


@dataclass
class StepMonitor:
    """Progress bar and callback of one batch.

    first, count: the number of its first image, and how many images it has.
    before, after: the steps of the stages before and after the one that runs.
    noted: of each image, once the run is done; None if it gives latents.
    """

    plan: Plan
    first: int
    count: int
    bar: tqdm[Any]
    callback: Callback | None
    before: int = 0
    after: int = 0
    stopped: bool = False
    noted: Tensor | None = None

    def step(self, step: int, state: State, t: float) -> bool:
        """Report a finished step -> whether to continue.

        step: how many steps are finished. t: the time reached.
        """
        self.bar.update()
        if self.callback is None:
            return True
        v = state.newest_velocity
        assert v is not None
        # A copy: whoever writes to it changes no image.
        x = state.x[: self.count].clone()
        preview = denoised(state.x, v, t)[: self.count]
        steps = self.before + len(self.plan) + self.after
        info = StepInfo(self.before + step, steps, t, self.first, x, preview)
        self.stopped = self.callback(info) is False
        return not self.stopped


def integrate(
    plan: Plan,
    field: Field,
    x: Tensor,
    monitor: StepMonitor | None = None,
    after: Callable[[Tensor, float], Tensor] | None = None,
) -> State:
    """Integrate one batch along a plan: x (N, ...) at the plan's start -> the state at its end.

    monitor: is called after each step, and may end the run.
    after: (x, t) -> x, applied after each step.
    """
    state = State(x)
    for i, (step, t0, t1) in enumerate(plan.schedule()):
        state = step(field, state, t0, t1)
        if after is not None:
            state = state._replace(x=after(state.x, t1))
        if monitor is not None and not monitor.step(i + 1, state, t1):
            break
    return state


def both_ends(state: State, t: float) -> Tensor:
    """What the next stage needs of a state at time t: where its path begins and ends.

    Returns (N, 2C, ...): the denoised estimate, then that of the noise. It costs no call.
    """
    v = state.newest_velocity
    assert v is not None
    return torch.cat([denoised(state.x, v, t), noise_estimate(state.x, v, t)], dim=1)


@dataclass(frozen=True)
class Job:
    """Everything that determines the work of a batch, except the number of its images.

    It is the key under which runs are captured.
    guided: whether both halves are evaluated. guidance_channels: 0 if they are not.
    dtype: of the noise.
    null_class, backend, precision, deterministic: as they are now; they may change between calls.
        precision is that of float32 products; deterministic means deterministic operations only.
    latent_shape: that of the noise.
    taken: names and row shapes of all other inputs: source, mask and conditions. Those of prompts
        may have any length; where a network must know the lengths of prompts, they are in it too,
        one number if all are the same.
    output "stage" is for a plan that another stage follows: see `both_ends`.
    """

    plan: Plan
    guided: bool
    guidance_channels: int
    output: str
    dtype: torch.dtype
    null_class: int | None
    backend: str
    precision: str
    deterministic: bool
    latent_shape: tuple[int, ...]
    taken: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(
        cls,
        model: FlowModel,
        plan: Plan,
        guidance: float,
        guidance_channels: int | None,
        output: str,
        dtype: torch.dtype,
    ) -> Job:
        """The job of these arguments, checked against the model.

        Raises ValueError or TypeError, naming the argument, for what does not fit.
        """
        if output not in ("latents", "uint8"):
            raise ValueError(f"output must be 'latents' or 'uint8', got {output!r}")
        if output == "uint8" and model.vae is None:
            raise ValueError("output='uint8' needs a model that was loaded with a vae")
        if plan.cost.refiner and model.refiner is None:
            raise ValueError(
                f"plan {plan} has refiner steps, but the model was loaded without refiner="
            )
        guided = model.guided(finite("guidance", guidance))
        channels = model.latent_shape[0]
        if guidance_channels is None:
            guidance_channels = model.guidance_channels
        elif not 1 <= positive("guidance_channels", guidance_channels) <= channels:
            raise ValueError(
                f"guidance_channels must be from 1 to {channels}, got {guidance_channels}"
            )
        with use_backend(model.backend):
            backend = requested_backend()
        precision, deterministic = (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        guidance_channels = guidance_channels if guided else 0
        return cls(
            plan,
            guided,
            guidance_channels,
            output,
            dtype,
            model.null_class,
            backend,
            precision,
            deterministic,
            model.latent_shape,
        )

    def __str__(self) -> str:
        start = f" from t = {self.plan.start:g}" if self.plan.start else ""
        output = self.output
        if output == "stage":
            output = f"a stage of {self.latent_shape[1]} x {self.latent_shape[2]}"
        return (
            f"plan {self.plan}{start} {'with' if self.guided else 'without'} guidance to {output}"
        )

    def taking(self, inputs: Mapping[str, Tensor]) -> Job:
        """The same job for inputs of these shapes."""
        rows = (
            (name, _lengths(value) if name.endswith("lengths") else tuple(value.shape[1:]))
            for name, value in inputs.items()
            if name not in ("noise", "guidance")
        )
        return replace(self, taken=tuple(sorted(rows)))

    def can_be_captured(self, model: FlowModel) -> bool:
        """Whether this job can be captured now.

        The device must allow it, and the work of the model's parts must not depend on the images.
        """
        parts = model.predictor, model.refiner, model.vae if self.output == "uint8" else None
        known = all(part is None or isinstance(part, _CAPTURABLE) for part in parts)
        return known and model.captures.possible(model.device)

    def run(
        self, model: FlowModel, inputs: Mapping[str, Tensor], guidance: float, monitor: StepMonitor
    ) -> Tensor:
        """Run one batch -> latents (N, C, H, W), or images, as `output` says.

        inputs: all on the model's device: noise (N, C, H, W); conditions, such as labels (N,);
            optionally source (N, C, H, W), latents that are mixed with the noise at the plan's
            start; and mask (N, 1, H, W) bool, True where the latents may change.
        """
        try:
            out = self._run(model, inputs, guidance, monitor)
        except torch.OutOfMemoryError:
            if monitor.callback is not None or not model.captures.report():
                raise
            out = None
        if out is None:
            model.captures.clear()  # their memory may be enough
            out = self._run(model, inputs, guidance, monitor)
        if self.output == "uint8":
            out, monitor.noted = unpack(out)
        return out

    def _run(
        self, model: FlowModel, inputs: Mapping[str, Tensor], guidance: float, monitor: StepMonitor
    ) -> Tensor:
        if monitor.callback is None and self.can_be_captured(model):
            out = model.captures.run(*self.capture(model, inputs, guidance))
            monitor.bar.update(len(self.plan))
            return out
        scale = (
            self._scales(model, len(inputs["noise"]), guidance)
            if model.device.type == "cuda"
            else guidance
        )
        return self.execute(model, **inputs, guidance=scale, monitor=monitor)

    def capture(
        self, model: FlowModel, inputs: Mapping[str, Tensor], guidance: float
    ) -> tuple[Key, Callable[..., Tensor], Mapping[str, Tensor], list[nn.Module]]:
        """The arguments of `Captures.run`: key, body, inputs and modules.

        inputs: those of `execute`, without guidance.
        """
        size = len(inputs["noise"])
        if self.guided:
            inputs = {**inputs, "guidance": self._scales(model, size, guidance)}
        parts = (
            model.predictor,
            model.refiner,
            getattr(model.vae, "network", None) if self.output == "uint8" else None,
        )
        modules = [part for part in parts if isinstance(part, nn.Module)]
        return (
            Key(self.taking(inputs), size),
            functools.partial(self.execute, model),
            inputs,
            modules,
        )

    def execute(
        self,
        model: FlowModel,
        noise: Tensor,
        guidance: float | Tensor = 1.0,
        monitor: StepMonitor | None = None,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """`run`, always eager; images come with what was noted of them, see `pack`."""
        field = field_of(
            model, self.plan, conditions, guidance if self.guided else None, self.guidance_channels
        )

        def keep_source(x: Tensor, t: float) -> Tensor:
            return torch.where(cast(Tensor, mask), x, on_path(cast(Tensor, source), noise, t))

        x = noise if source is None else on_path(source, noise, self.plan.start)
        with use_backend(model.backend), without_autocast(model.device):
            state = integrate(self.plan, field, x, monitor, None if mask is None else keep_source)
        if self.output == "stage" and not (monitor is not None and monitor.stopped):
            return both_ends(state, self.plan.end)
        return pack(*model.decode_noting(state.x)) if self.output == "uint8" else state.x

    @staticmethod
    def _scales(model: FlowModel, count: int, guidance: float) -> Tensor:
        """Guidance as a tensor (count, 1, 1, 1), so that it is an input of a captured graph."""
        dtype = torch.promote_types(model.dtype, torch.float32)
        return torch.full((count, 1, 1, 1), guidance, dtype=dtype, device=model.device)


def _lengths(lengths: Tensor) -> tuple[int, ...]:
    values = tuple(lengths.tolist())
    return values[:1] if len(set(values)) == 1 else values
