"""A refiner beside a pipeline's network: it follows the calls that the pipeline makes."""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.prompt_kind import original, type_name
from ..models.prompt_kinds import KINDS, check_text_alone, kind_of
from .patches import Patch, Undo, compiled_in_place
from .placement import place

_NOT_FOR_REFINERS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
_OTHER_NETWORKS = ("skip_layers", "kv_cache_mode", "siglip_feats", "image_noise_mask")
"""Arguments with which a call is none that a refiner could follow."""


class _Call(NamedTuple):
    """A call of the network. velocity: its output, as the pipeline keeps its latents."""

    arguments: dict[str, Any]
    velocity: Tensor


class _Followed(NamedTuple):
    """The calls of one step, one or two, and how the pipeline combines them.

    weight: of the first velocity, that of the second being 1 - weight; (). 1 if there is one.
    rescaled: whether the result is rescaled by the first velocity, as Qwen-Image's pipelines do.
    """

    calls: list[dict[str, Any]]
    weight: Tensor
    rescaled: bool


class _Memory(threading.local):
    """What a refiner knows of the run that is on in this thread.

    calls: since the last step, two at the most. velocity: of the present step, as the pipeline gave
    it, made of `step_calls`. followed: how, once it was asked for. placed: whether the refiner has
    been brought to where the run is.
    """

    running = placed = False
    calls: tuple[_Call, ...] = ()
    step_calls: tuple[_Call, ...] = ()
    velocity: Tensor | None = None
    followed: _Followed | None = None

    def clear(self) -> None:
        vars(self).clear()


class AttachedRefiner:
    """A refiner that gets the arguments of the network's last call, and returns its offset.

    Where that step was guided, by two halves of one call or by two calls, the offset is guided in
    the same way, with the scale that the pipeline's result shows. Calls are noted while a run of
    the pipeline's scheduler is on in their thread.
    The refiner is brought to where the pipeline runs, and into the network's dtype.
    Raises ValueError for a pipeline that gives its network more than latents and prompts, and for a
    refiner without weights.
    """

    def __init__(self, pipe: Any, network: Any, refiner: nn.Module) -> None:
        check_text_alone(network, pipe)
        self.network, self.refiner, self.kind = network, refiner, kind_of(network)
        # That of an offloaded network says where its weights wait.
        place(refiner, getattr(pipe, "_execution_device", network.device), network)
        self._names = list(inspect.signature(type(original(network)).forward).parameters)[1:]
        self._memory = _Memory()
        self._undo = [_watch(one, self) for one in networks_of(pipe)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_memory"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._memory = _Memory()

    def remove(self) -> None:
        """Follow the network no longer."""
        for undo in self._undo:
            undo()
        self.end()

    def note(self, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        """The network was called. No more than two calls are kept, as many as a step has."""
        if not self._memory.running:  # it serves another pipeline
            return
        call = _Call(
            {**dict(zip(self._names, arguments, strict=False)), **named},
            self.kind.sign * self.kind.output(result).detach(),
        )
        self._memory.calls = (*self._memory.calls[-1:], call)

    def observe(self, v: Tensor) -> None:
        """A step's velocity has reached the scheduler.

        v: as the pipeline gave it, of the shape of its latents. How it was made is looked up when
        the refiner is called, since that waits for the device.
        """
        memory = self._memory
        memory.running = True  # also where a loop goes through the timesteps a second time
        memory.velocity, memory.step_calls, memory.calls = v, memory.calls, ()
        memory.followed = None

    def stepped(self) -> None:
        """The scheduler has finished a step."""
        memory = self._memory
        memory.velocity, memory.step_calls, memory.calls = None, (), ()
        memory.followed = None

    def reset(self) -> None:
        """A new run begins: what an earlier one left, or a failed one, is void."""
        self._memory.clear()
        self._memory.running = True

    def end(self) -> None:
        """The run has ended, or failed: prompts and latents are the pipeline's own."""
        self._memory.clear()

    @torch.no_grad()
    def __call__(self, x: Tensor, noise_level: float, v: Tensor) -> Tensor:
        """The offset of v, like x. x, v: of the pipeline's latents, packed for FLUX."""
        memory = self._memory
        if memory.followed is None:
            memory.followed = _follow(memory.velocity, memory.step_calls, self.kind)
        if not memory.placed:
            place(self.refiner, x.device, self.network)
            memory.placed = True
        followed = memory.followed
        offsets = torch.cat([self._offsets(call, x, noise_level, v) for call in followed.calls])
        if len(offsets) == len(x):
            return offsets
        first, second = offsets.chunk(2)
        guided = second + followed.weight.to(x.dtype) * (first - second)
        if followed.rescaled:
            return self.kind.rescale_latents(v + guided, v + first) - v
        return guided

    def _offsets(self, call: dict[str, Any], x: Tensor, noise_level: float, v: Tensor) -> Tensor:
        """The refiner's output for a call, with its rows."""
        arguments = {name: call[name] for name in call if name not in _NOT_FOR_REFINERS}
        if not {self.kind.input, self.kind.time} <= arguments.keys():
            raise ValueError(_CANNOT_FOLLOW)
        arguments[self.kind.input] = self.kind.beside(arguments[self.kind.input], x, v)
        time = arguments[self.kind.time]
        arguments[self.kind.time] = torch.full_like(time, self.kind.timestep(noise_level))
        output = self.kind.output(self.refiner(**arguments | {"return_dict": False}))
        axis = self.kind.channel_axis
        return self.kind.sign * output.narrow(axis, 0, x.shape[axis]).to(x.dtype)


_CANNOT_FOLLOW = (
    "a refiner follows steps of one call of the network, or of two, with a prompt and a negative "
    "prompt, and this pipeline made its velocity otherwise: use a plan without refiner steps"
)


def networks_of(pipe: Any) -> list[Any]:
    """A pipeline's transformer, and the second one that Wan 2.2 has for low noise levels."""
    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [part for part in parts if part is not None and type_name(part) in KINDS]


class _Recorder:
    """Tells a refiner of every call of a network, as its forward hook or in its place."""

    def __init__(self, refiner: AttachedRefiner, original: Any = None) -> None:
        self.refiner, self.original, self.active = refiner, original, True

    def __call__(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        self.refiner.note(args, kwargs, result)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        if self.active:
            self.refiner.note(args, kwargs, result)
        return result

    def switch_off(self) -> None:
        self.active = False


def _watch(network: nn.Module, refiner: AttachedRefiner) -> Undo:
    """Tell the refiner of the network's calls -> what undoes it."""
    if not compiled_in_place(network):
        return network.register_forward_hook(_Recorder(refiner), with_kwargs=True).remove
    # Its hooks would be compiled with it.
    name = "_compiled_call_impl"
    return Patch(network, name, _Recorder(refiner, getattr(network, name)).call)


def _follow(v: Tensor | None, calls: tuple[_Call, ...], kind: Any) -> _Followed:
    """How a step's velocity v was made of the calls before it; ValueError for other ways."""
    if v is None or not calls:
        raise ValueError(_CANNOT_FOLLOW)
    last = calls[-1]
    pair = len(calls) == 2 and (
        calls[0].arguments.get(kind.input) is last.arguments.get(kind.input)
    )
    step = calls if pair else (last,)
    velocities = [call.velocity for call in step]
    if not pair and len(last.velocity) == 2 * len(v):
        velocities = list(last.velocity.split(len(v)))
    if any(velocity.shape != v.shape for velocity in velocities) or any(
        call.arguments.get(name) is not None for call in step for name in _OTHER_NETWORKS
    ):
        raise ValueError(_CANNOT_FOLLOW)
    weight, error, rescaled = _combination(v, [part.to(v.dtype) for part in velocities], kind)
    # Above it is more than rounding.
    if error > _tolerance(last.velocity.dtype):
        raise ValueError(_CANNOT_FOLLOW)
    return _Followed([call.arguments for call in step], weight, rescaled)


def _combination(v: Tensor, parts: list[Tensor], kind: Any) -> tuple[Tensor, float, bool]:
    """How v is made of the velocities of a step's calls -> weight and rescaled, as in _Followed,
    and error: how far this is from v, relative to it.

    The weight of v = second + weight * (first - second) is that of least squares, in float64.
    """
    one = torch.ones((), dtype=torch.float64, device=v.device)
    if len(parts) == 1:
        return one, _error(v, parts[0]), False
    first, second = parts
    difference = first - second
    weight = _ratio(v - second, difference)
    error = _error(v, second + weight.to(v.dtype) * difference)
    if not kind.rescales or error < 1e-6:
        return weight, error, False
    # Rescaled, every token of v is parallel to the guided one: their parts across v cancel.
    across = [part - v * (_dots(part, v) / _dots(v, v)) for part in (second, difference)]
    scale = -_ratio(*across)
    guided = kind.rescale_latents(second + scale.to(v.dtype) * difference, first)
    other = _error(v, guided)
    return (scale, other, True) if other < error else (weight, error, False)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The number by which b is nearest to a, () float64; 0 for b = 0."""
    a, b = a.double(), b.double()
    return (a * b).sum() / (b * b).sum().clamp(min=1e-300)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Of tokens (..., C) -> (..., 1)."""
    return (a * b).sum(-1, keepdim=True)


def _error(v: Tensor, made: Tensor) -> float:
    """|v - made| / |v|. Waits for the device."""
    return float((v - made).norm() / v.norm().clamp(min=1e-30))


def _tolerance(dtype: torch.dtype) -> float:
    """The largest error that rounding may make: guidance magnifies it."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)
