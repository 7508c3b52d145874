"""Attributes of instances that are set, and set back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Undo = Callable[[], object]
"""Undoes a change."""


class Patch:
    """An attribute of an instance, set; calling the patch undoes it.

    If another library has set the attribute since then, and keeps what it found there, its value
    stays, and ours is switched off: if it is a method of an object with `switch_off`, that is
    called, after which it must pass everything through.
    A patch can be pickled and copied, with its target.
    """

    def __init__(self, target: Any, name: str, value: Any) -> None:
        self.target, self.name, self.value = target, name, value
        self.existed, self.before = name in vars(target), vars(target).get(name)
        object.__setattr__(target, name, value)

    def __call__(self) -> None:
        present = vars(self.target).get(self.name)
        # A copied method is another object, of the same instance.
        ours = present == self.value if isinstance(present, MethodType) else present is self.value
        if not ours:
            switch_off = getattr(getattr(self.value, "__self__", self.value), "switch_off", None)
            if switch_off is not None:
                switch_off()
        elif self.existed:
            object.__setattr__(self.target, self.name, self.before)
        else:
            object.__delattr__(self.target, self.name)


def patch(target: Any, name: str, value: Any) -> Undo:
    """Set an attribute of an instance -> what undoes it: see `Patch`."""
    return Patch(target, name, value)


def compiled_in_place(network: nn.Module) -> bool:
    """Whether network.compile() was called, which compiles its hooks and its forward."""
    return vars(network).get("_compiled_call_impl") is not None
