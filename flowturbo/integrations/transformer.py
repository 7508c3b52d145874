"""Changes of a pipeline's transformer: fused adaLN, CUDA graphs, and a refiner beside it.

Only the instance is changed. Each change can be undone, pickled and copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flowturbo_kernels import adaln_modulate

from ..models.prompt_kind import original, type_name
from ..runtime.cuda_graphs import Captures, Key
from .caches import counting_cache, hooks_of, moved_weights
from .patches import Patch, Undo, compiled_in_place, patch
from .refining import AttachedRefiner, networks_of

__all__ = [
    "AttachedRefiner",
    "Graphed",
    "Undo",
    "counting_cache",
    "fuse_adaln",
    "networks_of",
    "patch",
]

_CONSTANTS = bool | int | float | str | torch.dtype | torch.device
"""Types of arguments that are equal if they look the same."""


def fuse_adaln(network: nn.Module) -> list[Undo]:
    """Fuse LayerNorm and modulation of every adaLN layer -> functions that undo it.

    The layers' own linear layers stay, with their LoRAs. A compiled network is left as it is: its
    compiler fuses them.
    """
    if original(network) is not network or compiled_in_place(network):
        return []
    return [FusedLayer(module).undo for module in network.modules() if _can_be_fused(module)]


def _can_be_fused(module: nn.Module) -> bool:
    norm: Any = getattr(module, "norm", None)
    plain = isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None
    return type(module).__name__ in _FUSED and plain and getattr(module, "emb", None) is None


class FusedLayer:
    """The forward of an adaLN layer, fused."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.fused = layer, _FUSED[type(layer).__name__]
        self.replaced, self.active = layer.forward, True
        self.undo = Patch(layer, "forward", self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.replaced(*args, **kwargs)
        return self.fused(self.layer, *args, **kwargs)

    def switch_off(self) -> None:
        self.active = False


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

    There is one capture for each structure, shape and dtype of the arguments. Calls that can't be
    captured are eager; while a cache that counts calls is in the network, all of them are, and
    `captures.refused()` says so.
    """

    def __init__(self, network: nn.Module, captures: Captures) -> None:
        self.network, self.captures, self.active = network, captures, True
        # What network.compile() made calls the compiled forward, hooks and all.
        name = "_compiled_call_impl" if compiled_in_place(network) else "forward"
        self._original = getattr(network, name)
        self._lists = type_name(network) == "ZImageTransformer2DModel"
        self.remove = Patch(network, name, self.forward)

    def switch_off(self) -> None:
        """Pass all calls through from now on."""
        self.active = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = {f"input{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if not self.active or not self._can_be_captured(kwargs, tensors, others):
            return self._original(*args, **kwargs)
        settings = (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())

        def body(**inputs: Tensor) -> Tensor:
            arguments = [inputs.get(f"input{i}", leaf) for i, leaf in enumerate(leaves)]
            positional, named = pytree.tree_unflatten(arguments, structure)
            result = self._original(*positional, **named)[0]
            return torch.stack(result) if self._lists else result

        # Two networks of a pipeline share the captures.
        what = id(self.network), str(structure), repr(others), shapes, settings
        out = self.captures.run(Key(what, self._rows(tensors)), body, tensors, [self.network])
        return (list(out.unbind()) if self._lists else out,)

    def _can_be_captured(
        self, kwargs: dict[str, Any], tensors: dict[str, Tensor], others: list[Any]
    ) -> bool:
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        if (
            kwargs.get("return_dict") is not False
            or kwargs.get("kv_cache_mode") is not None  # it returns a second result
            or any(other is not None and not isinstance(other, _CONSTANTS) for other in others)
            or any(tensor.device != device for tensor in tensors.values())
            or torch.is_grad_enabled()
            or not self.captures.possible(device)
        ):
            return False
        if kwargs.get("encoder_hidden_states_mask") is not None:
            # Qwen-Image's network copies a number from the host for it.
            self.captures.tell(Key("mask", 0), "prompts of different lengths in one batch")
            return False
        why, name, hooks = None, type_name(self.network), hooks_of(self.network)
        if cache := counting_cache(self.network, hooks):
            why = f"{cache} is in the {name}, and counts calls"
        elif mover := moved_weights(self.network, hooks):
            # Every call would be captured again.
            why = f"{mover} moves the weights of the {name} in every call"
        self.captures.tell(Key("hooks", 0), why)
        return why is None

    def _rows(self, tensors: dict[str, Tensor]) -> int:
        """The number of images: of the times, where latents come in a list."""
        first = next(iter(tensors.values()))
        times = [t for t in tensors.values() if t.ndim == 1] if self._lists else []
        return len(times[0] if times else first)
