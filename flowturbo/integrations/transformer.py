"""Changes of a pipeline's transformer: fused adaLN, CUDA graphs, and a refiner beside it.

Only the instance is changed. Each change can be undone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flowturbo_kernels import adaln_modulate

from ..models.text_to_image import KINDS
from ..runtime.cuda_graphs import Captures, Key

Undo = Callable[[], object]
"""Undoes a change."""
_NOT_FOR_REFINERS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "skip_layers",
)


def patch(target: Any, name: str, value: Any) -> Undo:
    """Set an attribute of an instance -> a function that undoes it."""
    existed, before = name in vars(target), vars(target).get(name)
    object.__setattr__(target, name, value)

    def undo() -> None:
        if existed:
            object.__setattr__(target, name, before)
        else:
            object.__delattr__(target, name)

    return undo


def fuse_adaln(network: nn.Module) -> list[Undo]:
    """Fuse LayerNorm and modulation of every adaLN layer -> functions that undo it.

    The layers' own linear layers stay, with their LoRAs.
    """
    undo = []
    for module in network.modules():
        fused = _FUSED.get(type(module).__name__)
        norm: Any = getattr(module, "norm", None)
        plain = isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None
        if fused is not None and plain and getattr(module, "emb", None) is None:
            undo.append(patch(module, "forward", functools.partial(fused, module)))
    return undo


def _zero(
    layer: Any,
    x: Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: Any = None,
) -> Any:
    shift, scale, *rest = layer.linear(layer.silu(emb)).chunk(6, dim=1)
    return adaln_modulate(x, shift, scale, layer.norm.eps), *rest


def _zero_single(layer: Any, x: Tensor, emb: Any = None) -> Any:
    shift, scale, gate = layer.linear(layer.silu(emb)).chunk(3, dim=1)
    return adaln_modulate(x, shift, scale, layer.norm.eps), gate


def _continuous(layer: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = layer.linear(layer.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return adaln_modulate(x, shift, scale, layer.norm.eps)


_FUSED: dict[str, Callable[..., Any]] = {
    "AdaLayerNormZero": _zero,
    "AdaLayerNormZeroSingle": _zero_single,
    "AdaLayerNormContinuous": _continuous,
}


class Graphed:
    """Calls of a network that are replayed from captures.

    There is one capture for each structure, shape and dtype of the arguments.
    """

    def __init__(self, network: nn.Module, captures: Captures) -> None:
        self.network, self.captures = network, captures
        self._original = network.forward
        self.remove = patch(network, "forward", self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = {f"input{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        returns_tuple = kwargs.get("return_dict") is False
        # With offloading the weights move, so that every call would be captured again.
        offloaded = hasattr(self.network, "_hf_hook")
        on_device = all(tensor.device == device for tensor in tensors.values())
        if (
            not returns_tuple
            or offloaded
            or not on_device
            or torch.is_grad_enabled()
            or not self.captures.possible(device)
        ):
            return self._original(*args, **kwargs)
        constants = repr([None if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        settings = (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())

        def body(**inputs: Tensor) -> Tensor:
            arguments = [inputs.get(f"input{i}", leaf) for i, leaf in enumerate(leaves)]
            positional, named = pytree.tree_unflatten(arguments, structure)
            return self._original(*positional, **named)[0]

        rows = next(iter(tensors.values())).shape[0]
        return (
            self.captures.run(
                Key((str(structure), constants, shapes, settings), rows),
                body,
                tensors,
                [self.network],
            ),
        )


class AttachedRefiner:
    """A refiner that gets the arguments of the transformer's last call, and returns its offset.

    If that call had both halves, unconditional first, as in SD3's pipelines, the offset is guided
    with the pipeline's scale.
    """

    def __init__(self, pipe: Any, network: nn.Module, refiner: nn.Module) -> None:
        self.pipe, self.refiner, self.kind = pipe, refiner, KINDS[type(network).__name__]
        self._packed = type(network).__name__ == "FluxTransformer2DModel"
        self._local = threading.local()
        self.remove = network.register_forward_pre_hook(self._note, with_kwargs=True).remove

    def _note(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.calls = [*getattr(self._local, "calls", []), kwargs]

    def stepped(self) -> None:
        """Forget the recorded calls: the scheduler has finished a step."""
        self._local.calls = []

    def reset(self) -> None:
        """A new run begins: what a failed one may have left is void."""
        self.stepped()

    @torch.no_grad()
    def __call__(self, x: Tensor, noise_level: float, v: Tensor) -> Tensor:
        """The offset of v, like x. x, v: of the pipeline's latents, packed for FLUX."""
        calls = getattr(self._local, "calls", [])
        if len(calls) != 1 or "hidden_states" not in calls[0]:
            raise ValueError(
                "a refiner follows one call of the transformer a step, by keyword, got "
                f"{len(calls)}: is true_cfg_scale in use?"
            )
        arguments = {
            name: value for name, value in calls[0].items() if name not in _NOT_FOR_REFINERS
        }
        predictor_input = arguments["hidden_states"]
        halves = len(predictor_input) // len(x)
        arguments["hidden_states"] = (
            torch.cat([x, v], dim=-1 if self._packed else 1)
            .repeat(halves, *[1] * (x.ndim - 1))
            .to(predictor_input.dtype)
        )
        arguments["timestep"] = torch.full_like(
            arguments["timestep"], noise_level * (1 if self._packed else 1000)
        )
        offset = self.kind.sign * self.refiner(**arguments | {"return_dict": False})[0].to(x.dtype)
        if halves == 2:
            unconditional, conditional = offset.chunk(2)
            offset = unconditional + self.pipe.guidance_scale * (conditional - unconditional)
        return offset
