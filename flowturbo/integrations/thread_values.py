"""Attributes with a value for each thread.

A stock scheduler has one value of each, so threads that share a pipeline would collide.
"""

from __future__ import annotations

import copy
import threading
from typing import Any


class _Threads:
    """Values that each thread has of its own.

    A thread that has set none reads those of the first thread.
    """

    def __init__(self, first: dict[str, Any] | None = None) -> None:
        self.first: dict[str, Any] = first or {}
        self._local = threading.local()

    def mine(self) -> dict[str, Any]:
        return self._local.__dict__

    def get(self, name: str) -> Any:
        return self.mine()[name] if name in self.mine() else self.first.get(name)

    def __copy__(self) -> _Threads:
        return _Threads({**self.first, **self.mine()})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Threads:
        return _Threads(copy.deepcopy({**self.first, **self.mine()}, memo))

    def __reduce__(self) -> Any:
        return _Threads, ({**self.first, **self.mine()},)


class PerThread:
    """A descriptor: an attribute of the instance with a value for each thread.

    shown: whether threads that have set none see the first thread's; else they see None.
    """

    def __init__(self, *, shown: bool = True) -> None:
        self.shown = shown

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault("_threads", _Threads()).get(self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        threads = instance.__dict__.setdefault("_threads", _Threads())
        threads.mine()[self.name] = value
        if self.shown:
            threads.first.setdefault(self.name, value)
