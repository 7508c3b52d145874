"""What a checkpoint's file says of how its network was trained.

Trainers store their arguments beside the weights: SiT's, REPA's and FlowTurbo's as an
argparse.Namespace under "args", others as a mapping under "config", Lightning as
"hyper_parameters", safetensors as text in its header.
"""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MAX_DEPTH, _MAX_ENTRIES, _MAX_TEXT = 6, 10_000, 1 << 20

# Names of arguments, in lower case with "_", and the values (letters and digits alone) by which a
# network is a velocity on the straight path between noise and data.
_PATH_NAMES = {"path_type", "interpolant", "interpolant_type"}
_LINEAR = {"linear", "icplan", "ot", "condot", "straight", "rectified", "rectifiedflow"}
_PREDICTION_NAMES = {"prediction", "prediction_type", "pred_type", "model_prediction"}
_VELOCITY = {"velocity", "v", "vel", "flow", "velocityfield", "vectorfield", "flowprediction"}
# v-prediction of diffusion models is a velocity only on the straight path.
_VELOCITY_IF_LINEAR = {"vprediction", "vpred"}
# These names have other meanings, too: only what speaks of a diffusion model counts.
_LOOSE_NAMES = {
    *("objective", "parameterization", "parametrization", "predict", "predict_type", "pred"),
    *("target", "target_type", "train_target", "model_mean_type", "model_output", "output_type"),
    *("path", "flow_path", "schedule", "schedule_type", "interpolation", "sde_type", "process"),
}
_DIFFUSION = re.compile(r"(pred)?(noise|eps|epsilon|x0|xstart|startx|score)|g?vp(sde)?|ve(sde)?")
_SCHEDULE_NAMES = {"noise_schedule", "beta_schedule", "predict_xstart"}

_CLASS_NAMES = {"num_classes", "n_classes", "nb_classes", "class_num", "num_class"}
_DROPOUT_NAMES = {
    *("class_dropout_prob", "cfg_prob", "label_drop", "label_dropout", "label_dropout_prob"),
    *("label_drop_prob", "class_drop_prob", "cond_drop_prob", "class_dropout", "p_uncond"),
    *("uncond_prob", "drop_label_prob", "cfg_dropout", "cfg_dropout_prob"),
}
_REPA_NAMES = {"enc_type", "proj_coeff", "encoder_depth", "cfg_prob"}


@dataclass(frozen=True)
class Said:
    """What a file says: names of arguments as they stand there, with their values.

    other: why its network is no velocity on the straight path, or None.
    classes: numbers of classes. dropout: the probability with which labels were dropped, or None.
    repa: whether they are the arguments of REPA's trainer, whose time runs backwards.
    """

    other: str | None = None
    classes: frozenset[int] = frozenset()
    dropout: float | None = None
    repa: bool = False


def said_by(contents: Any, name: str = "") -> Said:
    """What the content of a file says, without its tensors.

    contents: mappings, lists and Namespaces of any depth, of which texts may be JSON.
    name: of the file. Those of DiT's published files count, which say nothing else.
    """
    entries = list(_entries(contents))
    names = {entry for entry, _, _ in entries}
    numbers = [(entry, _number(value)) for entry, _, value in entries]
    return Said(
        other=_other(name, entries),
        classes=frozenset(
            int(number)
            for entry, number in numbers
            if entry in _CLASS_NAMES and number is not None and number > 0
        ),
        dropout=next(
            (n for entry, n in numbers if entry in _DROPOUT_NAMES and n is not None), None
        ),
        repa=len(names & _REPA_NAMES) >= 2,
    )


def _number(value: Any) -> float | None:
    """A finite number, or the one that a text holds: all metadata of safetensors are texts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _other(file_name: str, entries: list[tuple[str, str, Any]]) -> str | None:
    """Why a network is no velocity on the straight path, in words; None: nothing says so."""
    texts = [(n, w, v) for n, w, v in entries if isinstance(v, str) and _plain(v)]
    linear = any(n in _PATH_NAMES and _plain(v) in _LINEAR for n, _, v in texts)
    velocity = any(n in _PREDICTION_NAMES and _plain(v) in _VELOCITY for n, _, v in texts)
    for name, where, value in texts:
        plain = _plain(value)
        if (
            (name in _PATH_NAMES and plain not in _LINEAR)
            or (
                name in _PREDICTION_NAMES
                and plain not in _VELOCITY
                and not (linear and plain in _VELOCITY_IF_LINEAR)
            )
            or (name in _LOOSE_NAMES and _DIFFUSION.fullmatch(plain))
        ):
            return f"{where} is {value[:60]!r}"
    if linear or velocity:
        return None
    for name, where, value in entries:
        if name in _SCHEDULE_NAMES and value:
            return f"{where} is {str(value)[:60]!r}, as in a diffusion model"
    for name, where, value in texts:
        if name in ("model", "arch", "model_name") and re.match(r"DiT-", value, re.IGNORECASE):
            return f"{where} is {value[:60]!r}, and DiT predicts noise"
    if re.match(r"DiT-(S|B|L|XL)-", file_name):
        return f"its name is {file_name!r}, and DiT predicts noise"
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _entries(contents: Any) -> Iterator[tuple[str, str, Any]]:
    """Every entry of nested mappings that is none itself: its name in lower case, with "_", the
    names that lead to it, and its value.

    Tensors and what contains itself are left out, and so is what comes after very many entries.
    """
    seen: dict[int, Any] = {}  # with the values, so that no other gets the number of one of them
    waiting: deque[tuple[str, Any]] = deque([("", contents)])
    count = 0
    while waiting and count < _MAX_ENTRIES:
        where, value = waiting.popleft()
        if id(value) in seen or where.count(".") >= _MAX_DEPTH:
            continue
        seen[id(value)] = value
        items = value.items() if isinstance(value, Mapping) else _numbered(value)
        for key, item in items:
            count += 1
            place = f"{where}.{key}" if where else str(key)
            inner = _container(item)
            if inner is not None:
                waiting.append((place, inner))
            elif not isinstance(item, Tensor):
                name = re.split(r"[./]", str(key))[-1].lower().replace("-", "_")
                yield name, place, item


def _numbered(value: list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    return ((str(i), item) for i, item in enumerate(value[:_MAX_ENTRIES]))


def _container(item: Any) -> Any:
    """What holds further entries: a mapping or list, a Namespace's mapping, a text's JSON."""
    if isinstance(item, Namespace):
        return vars(item)
    if isinstance(item, Mapping | list | tuple):
        return item
    if isinstance(item, str) and item[:1] == "{" and len(item) <= _MAX_TEXT:
        try:
            return json.loads(item)
        except (ValueError, RecursionError):
            return None
    return None
