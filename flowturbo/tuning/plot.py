"""The plot of `flowturbo tune`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from ..evaluation.plots import FAMILIES, FONT, need_matplotlib, plain_ticks, save_figure
from ..evaluation.statistics import pareto_front

TUNED = {
    "fitted": ("#000000", "o"),
    "fitted, with refiner steps": ("#d55e00", "P"),
    "unfitted, searched": ("#56b4e9", "X"),
}
_MORE = [("#e69f00", "<"), ("#0072b2", ">"), ("#999933", "d"), ("#882255", "h"), ("#117733", "p")]


def plot_tuning(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot the results of `tune` as a PNG: each distance against cost.

    The distances are that to the fine solution and, for digits, the Fréchet distance. Of each group
    of plans only the Pareto front is drawn.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = results["rows"]
    unit = (
        "predictor calls" if results["settings"]["budget_ms"] is None else "milliseconds per image"
    )
    measures = [("rms", f"RMS distance to {results['settings']['reference_plan']}")]
    measures += [("frechet", "Fréchet distance to held-out digits")] if "frechet" in rows[0] else []
    with rc_context(FONT):
        figure = Figure(figsize=(6.5 * len(measures), 5.5), dpi=120, layout="constrained")
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, (measure, title) in zip(panels, measures, strict=True):
            more_styles = iter(itertools.cycle(_MORE))
            for name in sorted(
                {row["group"] for row in rows}, key=lambda name: (name in TUNED, name)
            ):
                members = sorted(
                    (row for row in rows if row["group"] == name), key=lambda row: row["price"]
                )
                colour, marker = TUNED.get(name) or FAMILIES.get(name) or next(more_styles)
                on_front = pareto_front([(row["price"], row[measure]) for row in members])
                front = [row for row, on in zip(members, on_front, strict=True) if on]
                axes.errorbar(
                    [row["price"] for row in front],
                    [row[measure] for row in front],
                    yerr=[row[f"{measure}_error"] for row in front],
                    color=colour,
                    marker=marker,
                    markersize=8 if name in TUNED else 5,
                    linewidth=1.6 if name in TUNED else 0.8,
                    label=name,
                    zorder=3 if name in TUNED else 2,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            plain_ticks(axes.xaxis, (1, 1.5, 2, 3, 4, 5, 6, 8))
            plain_ticks(axes.yaxis)
            axes.set_xlabel(f"cost in {unit}")
            axes.set_ylabel(title)
            axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7, zorder=-1)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper center", ncols=min(5, len(names)), frameon=False
        )
        save_figure(figure, path)
