"""The plot of `flowturbo evaluate --data`: distances against cost, a column for each scale."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .class_report import TITLES, own_precision
from .plots import FAMILIES, FONT, label_points, need_matplotlib, save_figure, scatter, split_far
from .statistics import Row, value_error

MEASURES = ("rms", "frechet", "kid")


def plot_classes(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot the results of `evaluate_classes` as a PNG, with a standard error on each point.

    A point at or below 0, which an unbiased distance may be at, has no place on a log axis: it is
    left out.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    own = own_precision(results, results["rows"])
    scales = sorted({row["guidance"] for row in own})
    with rc_context(FONT):
        figure = Figure(
            figsize=(1 + 6 * len(scales), 5 * len(MEASURES)), dpi=120, layout="constrained"
        )
        panels = figure.subplots(len(MEASURES), len(scales), sharex="col", squeeze=False)
        drawn = [
            (axes, key, _rows(own, scale, key))
            for key, line in zip(MEASURES, panels, strict=True)
            for scale, axes in zip(scales, line, strict=True)
        ]
        for axes, key, rows in drawn:
            if rows:
                scatter(axes, rows, "cost", key)
                _error_bars(axes, split_far(rows, key)[0], key)
        for scale, axes in zip(scales, panels[0], strict=True):
            axes.set_title(f"guidance {scale:g}")
        for axes in panels[-1]:
            axes.set_xlabel("cost in predictor calls")
        for key, line in zip(MEASURES, panels, strict=True):
            line[0].set_ylabel(TITLES[key])
        handles = {
            name: handle
            for axes, _, _ in drawn
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, frameon=False)
        figure.draw_without_rendering()  # labels are placed in pixels: fix the layout first
        figure.set_layout_engine("none")
        for axes, key, rows in drawn:
            if rows:
                label_points(axes, rows, "cost", key)
        save_figure(figure, path)


def _rows(rows: Sequence[Row], scale: float, key: str) -> list[Row]:
    return [row for row in rows if row["guidance"] == scale and row[key] > 0]


def _error_bars(axes: Any, rows: Sequence[Row], key: str) -> None:
    low, high = axes.get_ylim()
    for row in rows:
        error = value_error(row, key)
        axes.plot(
            [row["cost"]] * 2,
            [max(row[key] - error, 1e-3 * row[key]), row[key] + error],
            color=FAMILIES[row["family"]][0],
            linewidth=1,
            zorder=1,
        )
    axes.set_ylim(low, high)
    for text in axes.texts:  # what lies above the plot; it may be long
        text.set_text(textwrap.fill(text.get_text(), 70))
        text.set_in_layout(False)
