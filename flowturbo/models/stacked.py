"""Linear layers that read one input, with their weights side by side in memory: one product runs
them all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowturbo_kernels.batch_invariant import matmul

M = TypeVar("M", bound="Stackable")


class Stackable(nn.Module):
    """A module some of whose layers read one input."""

    _stack: tuple[Tensor, Tensor] | None = None
    """weight (sum of N, K) and bias (sum of N,) of all layers, over the memory of theirs."""

    @abstractmethod
    def stackable(self) -> list[nn.Linear]:
        """These layers, with biases."""

    def stack_(self: M) -> M:
        """Move the weights of these layers side by side into one piece of memory, and the biases.

        The parameters stay what they are, each with a storage of its own, a part of that memory: so
        optimizers, state_dict(), load_state_dict(), pickle and safetensors see no difference. After
        a cast, a move to another device, load_state_dict(assign=True), and in a copy, they are no
        longer side by side, and `products` makes one product a layer. Layers of several dtypes or
        devices, or made in inference mode, are left as they are.
        """
        layers = self.stackable()
        groups = [layer.weight for layer in layers], [layer.bias for layer in layers]
        parameters = [*groups[0], *groups[1]]
        kinds = {(p.dtype, p.device, p.is_inference(), type(p)) for p in parameters}
        alike = len(kinds) == 1 and next(iter(kinds))[2:] == (False, nn.Parameter)
        if self.stacked() is None and alike:
            with torch.inference_mode(False):
                self._stack = _side_by_side(groups[0]), _side_by_side(groups[1])
        return self

    def stacked(self) -> tuple[Tensor, Tensor] | None:
        """(weight (sum of N, K), bias (sum of N,)) of all layers, not copied; None unless they are
        side by side.
        """
        if self._stack is None:
            return None
        layers = self.stackable()
        weight, bias = self._stack
        if not _is_made_of(weight, [layer.weight for layer in layers]) or not _is_made_of(
            bias, [layer.bias for layer in layers]
        ):
            return None
        return self._stack

    def products(self, c: Tensor) -> list[Tensor]:
        """c (..., K) -> what each of these layers gives, (..., N); by one product if they are
        stacked and gradients are off.
        """
        layers = self.stackable()
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            whole = self.stacked()
            if whole is not None:
                return list(matmul(c, *whole).split([len(p.weight) for p in layers], dim=-1))
        return [matmul(c, layer.weight, layer.bias) for layer in layers]

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        super()._apply(fn, recurse)
        if self.stacked() is None:
            self._stack = None  # whose memory is free now
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_stack"}


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """All parameters along the first axis, in memory that is theirs from now on."""
    first = parameters[0].detach()
    whole = first.new_empty(sum(map(len, parameters)), *first.shape[1:])
    for piece, parameter in zip(whole.split([len(p) for p in parameters]), parameters, strict=True):
        piece.copy_(parameter.detach())
    start = 0
    for parameter in parameters:
        end = start + parameter.numel() * parameter.element_size()
        # A storage of its own: those who save weights take one for all for the same weight.
        own: Any = whole.untyped_storage()[start:end]
        parameter.data = whole.new_empty(0).set_(own, 0, parameter.shape, parameter.stride())
        start = end
    return whole


def _is_made_of(whole: Tensor, parameters: Sequence[Tensor]) -> bool:
    at = whole.data_ptr()
    for p in parameters:
        # Others, such as those of FakeTensorMode and vmap, have no address.
        if type(p) is not nn.Parameter or p.data_ptr() != at or p.dtype != whole.dtype:
            return False
        if not p.is_contiguous():
            return False
        at += p.numel() * p.element_size()
    return at == whole.data_ptr() + whole.numel() * whole.element_size()
