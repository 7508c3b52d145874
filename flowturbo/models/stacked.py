"""Linear layers that read one input, with their weights side by side in memory: one product runs
them all.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowturbo_kernels.batch_invariant import matmul

M = TypeVar("M", bound="Stackable")


class Stackable(nn.Module):
    """A module some of whose layers read one input."""

    @abstractmethod
    def stackable(self) -> list[nn.Linear]:
        """These layers, with biases."""

    def stack_(self: M) -> M:
        """Move the weights of these layers side by side into one piece of memory, and the biases.

        The parameters stay what they are: state_dict(), load_state_dict() and optimizers see no
        difference. After a cast, a move to another device, load_state_dict(assign=True), and in a
        copy, each has memory of its own again, and `products` makes one product a layer. Layers of
        several dtypes or devices, or made in inference mode, are left as they are.
        """
        layers = self.stackable()
        weights = [layer.weight for layer in layers]
        kinds = {(w.dtype, w.device, w.is_inference()) for w in weights}
        if stacked(layers) is None and len(kinds) == 1 and not weights[0].is_inference():
            for parameters in (weights, [layer.bias for layer in layers]):
                with torch.inference_mode(False):
                    whole = torch.cat([parameter.detach() for parameter in parameters])
                    pieces = whole.split([len(parameter) for parameter in parameters])
                    for parameter, piece in zip(parameters, pieces, strict=True):
                        parameter.data = piece
        return self

    def products(self, c: Tensor) -> list[Tensor]:
        """c (..., K) -> what each of these layers gives, (..., N); by one product if they are
        stacked and gradients are off.
        """
        layers = self.stackable()
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            whole = stacked(layers)
            if whole is not None:
                return list(matmul(c, *whole).split([len(p.weight) for p in layers], dim=-1))
        return [matmul(c, layer.weight, layer.bias) for layer in layers]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Each parameter would be pickled together with all others of its memory.
        layers = self.stackable()
        if stacked(layers) is not None:
            for layer in layers:
                for parameter in (layer.weight, layer.bias):
                    with torch.inference_mode(False):
                        parameter.data = parameter.data.clone()
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self: M, memo: dict[int, Any]) -> M:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def stacked(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor] | None:
    """(weight (sum of N, K), bias (sum of N,)) of all layers, not copied; None unless they are side
    by side.
    """
    weight = _joined([layer.weight for layer in layers])
    bias = _joined([layer.bias for layer in layers])
    return None if weight is None or bias is None else (weight, bias)


def _joined(parameters: Sequence[Tensor]) -> Tensor | None:
    first, end = parameters[0], parameters[0].data_ptr()
    memory = first.untyped_storage().data_ptr()
    for p in parameters:
        beside = p.data_ptr() == end and p.untyped_storage().data_ptr() == memory
        if not beside or p.dtype != first.dtype or not p.is_contiguous():
            return None
        end += p.numel() * p.element_size()
    rows = sum(len(p) for p in parameters)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
