"""Which rows of a checkpoint's label table are classes, and whether the last is the null class.

A table has a row for each class, and one more if labels were dropped in training. Its shape does
not tell the two apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..checks import whole
from .sit_config import SiTConfig
from .training_metadata import Said

TABLE = "y_embedder.embedding_table.weight"
NullClass = int | Literal["auto"] | None
_IMAGENET_ROWS = 1001


def arranged(
    path: object,
    state: Mapping[str, Tensor],
    said: Said,
    null_class: NullClass,
    like: SiTConfig | None,
) -> tuple[dict[str, Tensor], bool]:
    """The weights with the null class, if there is one, as the table's last row; and if there is.

    said: what the file says. null_class: its row; None: there is none; "auto": as the file says.
    like: the predictor's sizes, for a refiner whose file says nothing.
    A null class in another row is repeated as the last one. A last row that was never trained is
    left out. Raises ValueError for a row that is not there, and warns if the file does not say
    what the last row is.
    """
    table = state.get(TABLE)
    if table is None or table.ndim != 2 or not len(table):
        return dict(state), True  # whoever builds the network says what is wrong
    rows = len(table)
    if null_class == "auto":
        has_null, used = _as_said(path, rows, said, like)
    elif null_class is None:
        counted = rows - 1 in said.classes or (not said.classes and rows == _IMAGENET_ROWS)
        has_null, used = False, rows - 1 if counted and rows > 1 else rows
    else:
        row = whole("null_class", null_class)
        if not 0 <= row < rows:
            raise ValueError(
                f"null_class must be one of the {rows} rows of its label table, from 0 to "
                f"{rows - 1}, got {row}"
            )
        if row == rows - 1:
            has_null, used = True, rows
        else:
            return {**state, TABLE: torch.cat([table, table[row : row + 1]])}, True
    return {**state, TABLE: table[:used].contiguous() if used < rows else table}, has_null


def check_null_class(null_class: object) -> None:
    """Raise TypeError or ValueError unless it is a row, None or "auto"."""
    if null_class is None or null_class == "auto":
        return
    if isinstance(null_class, str):
        raise ValueError(
            f"null_class must be 'auto', None or a row of the label table, got {null_class!r}"
        )
    whole("null_class", null_class)  # type: ignore[arg-type]


def _as_said(path: object, rows: int, said: Said, like: SiTConfig | None) -> tuple[bool, int]:
    """Whether the last row is the null class, and how many rows are used."""
    classes_only, with_null = rows in said.classes, rows - 1 in said.classes
    if rows == 1:
        return False, 1
    if said.dropout == 0:
        # REPA's table has the row even then, but no step of training read it.
        return False, rows - 1 if with_null and not classes_only else rows
    if classes_only != with_null:
        return with_null, rows
    if said.dropout is not None:
        return True, rows
    if like is not None and like.label_rows == rows:
        return like.null_class is not None, rows
    if rows != _IMAGENET_ROWS or said.classes:
        numbers = " and ".join(map(str, sorted(said.classes)))
        says = f"speaks of {numbers} classes" if numbers else "does not say of how many classes"
        warnings.warn(
            f"{path} has a label table of {rows} rows, and {says}: the last row is taken for the "
            f"null class of guidance. Give null_class={rows - 1} if it is, null_class=None if it "
            f"is a class like the others (--null-class {rows - 1}, --null-class none; `flowturbo "
            "convert` keeps the answer)",
            stacklevel=6,
        )
    return True, rows
