"""A SiT's weights in what other people's trainers save.

They may stand under names ("ema", "state_dict"), with prefixes (DDP's, torch.compile's,
Lightning's), beside the weights of other networks, and more than once: averaged and not.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import listed

# What a SiT's names begin with.
_COMPONENTS = ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer", "pos_embed")
_NAME = re.compile(
    rf"(?P<prefix>(?:.*?\.)??)(?P<component>{'|'.join(_COMPONENTS)})(?:\.|$)", re.DOTALL
)
_ENOUGH = 3
"""How many of the components make a SiT. Other networks have blocks, too."""

# Put by wrappers of parts of a network: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MAX_DEPTH, _MAX_LIST = 5, 16
_CONTAINERS = (Mapping, list, tuple)


@dataclass(frozen=True)
class Place:
    """Where a SiT's weights stand: the names of mappings around them, and their keys' prefix."""

    path: tuple[str, ...]
    prefix: str
    keys: Mapping[Any, Any]

    def __str__(self) -> str:
        within = " in ".join(repr(name) for name in reversed(self.path))
        if not self.prefix:
            return within or "at the top level"
        return f"{self.prefix!r}..." + (f" in {within}" if within else "")

    @property
    def averaged(self) -> int:
        """How many of its names speak of an average of weights."""
        return sum(map(_is_average, (*self.path, *self.prefix.split("."))))


def unwrapped(content: Any) -> dict[Any, Any]:
    """The weights of a SiT in the content of a file, under a SiT's names.

    Averaged weights (EMA) are preferred to others, and "model" to what has another name. Weights of
    other networks beside them are left out. Without a SiT: the content as it is, if it is a
    mapping. Raises ValueError if it holds no mapping, several SiTs, or averages that can't be read.
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"holds no weights: expected a mapping of names to tensors, got {kind(content)}"
        )
    containers = list(_containers(content))
    places = [
        Place(path, prefix, value)
        for path, value in containers
        if isinstance(value, Mapping)
        for prefix in _prefixes(value)
    ]
    if not places:
        if any(isinstance(value, _CONTAINERS) for value in content.values()):
            raise ValueError(
                "holds no weights of a SiT: none of its mappings has keys such as "
                f"'x_embedder.proj.weight'. At its top level stand {_some(content)}"
            )
        return dict(content)
    most = max(place.averaged for place in places)
    if not most:
        _refuse_unread_average(containers, places[0])
    best = [place for place in places if place.averaged == most]
    if len(best) > 1:
        best = [place for place in best if place.path == ("model",)] or best
    if len(best) > 1:
        raise ValueError(
            f"holds several models, {', '.join(map(str, best[:6]))}, and does not say which is "
            "meant: load it with torch.load(..., weights_only=True), and torch.save one of them as "
            "a file of its own"
        )
    return _bare(best[0])


def _containers(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The content and every mapping and list in it, each once, with the names that lead to it."""
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(value))
        yield path, value
        inner = value.items() if isinstance(value, Mapping) else enumerate(value[:_MAX_LIST])
        waiting.extend(((*path, str(k)), v) for k, v in inner if isinstance(v, _CONTAINERS))


def _prefixes(keys: Mapping[Any, Any]) -> list[str]:
    """The prefixes under which there are enough of a SiT's components."""
    found: dict[str, set[str]] = {}
    for key, value in keys.items():
        match = _NAME.match(key) if isinstance(key, str) and isinstance(value, Tensor) else None
        if match is not None:
            found.setdefault(match["prefix"], set()).add(match["component"])
    return [prefix for prefix, components in found.items() if len(components) >= _ENOUGH]


def _bare(place: Place) -> dict[Any, Any]:
    """The weights of a place without prefix and wrappers; ValueError for keys that lack it."""
    if not place.prefix:
        return _without_wrappers(place.keys)
    bare: dict[Any, Any] = {}
    for key, value in place.keys.items():
        if isinstance(key, str) and key.startswith(place.prefix):
            bare[key[len(place.prefix) :]] = value
        elif isinstance(key, str) and key.split(".")[0] in _COMPONENTS:
            raise ValueError(
                f"has keys of a SiT with the prefix {place.prefix!r}, and {key!r} without it"
            )
    return _without_wrappers(bare)


def _without_wrappers(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state with the names of wrapped parts as they were; those that would collide stay."""
    bare: dict[Any, Any] = {}
    for key, value in state.items():
        if isinstance(key, str):
            plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
            key = key if plain != key and (plain in state or plain in bare) else plain
        bare[key] = value
    return bare


def _refuse_unread_average(containers: Sequence[tuple[tuple[str, ...], Any]], other: Place) -> None:
    """Raise ValueError if averaged weights are there, but not under a SiT's names.

    Weights before averaging give worse images, and no one would notice. None says that there are
    none.
    """
    for path, value in containers:
        if not any(map(_is_average, path)):
            continue
        beside = path[:-1] == other.path[: len(path) - 1]
        values = list(value.values() if isinstance(value, Mapping) else value)
        empty = all(isinstance(item, _CONTAINERS) and not item for item in values)
        if (empty and beside) or any(isinstance(item, Tensor) for item in values):
            what = "is empty" if empty else f"holds no names of a SiT, but {_some(value)}"
            name = next(name for name in path if _is_average(name))
            raise ValueError(
                f"has averaged weights (EMA) in {name!r}, which {what}. {_cure(other)}"
            )
    first = {name.split(".")[0] for name in other.keys if isinstance(name, str)}
    for name in sorted(filter(_is_average, first)):
        if sum(str(key).startswith(f"{name}.") for key in other.keys) > 2 * _ENOUGH:
            raise ValueError(
                f"has averaged weights (EMA) with the prefix '{name}.', but not under the names of "
                f"a SiT. {_cure(other)}"
            )


def _cure(other: Place) -> str:
    return (
        f"Weights before averaging are there ({other}): to use those, load the file with "
        "torch.load(..., weights_only=True), and torch.save them as a file of their own"
    )


def _is_average(name: str) -> bool:
    """Whether a name is that of averaged weights: ema, model_ema, ema_model, EMAModel, swa."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return any(word.lower() in ("ema", "emas", "swa", "averaged") for word in words) or (
        re.match(r"EMA[A-Z]", name) is not None
    )


def kind(value: object) -> str:
    """What a value is, for error messages."""
    return f"a {type(value).__name__}" + (" with nothing in it" if value in ({}, []) else "")


def _some(values: Any) -> str:
    """The first names of a mapping, or what a list holds."""
    if not isinstance(values, Mapping):
        return f"a {type(values).__name__} of {len(values)}"
    return listed(list(values), 5, lambda name: repr(name)[:60])
