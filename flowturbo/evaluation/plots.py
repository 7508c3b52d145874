"""Plots of quality against cost and of the velocity along trajectories.

They need matplotlib, which the extra "eval" installs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import IO, Any

from ..storage.files import atomic_write
from .statistics import name_of, pareto_front

Row = Mapping[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
FAMILIES = {
    "Euler": ("#8c8c8c", "v"),
    "Heun": ("#0072b2", "s"),
    "pseudo corrector": ("#009e73", "D"),
    "Adams-Bashforth": ("#cc79a7", "^"),
    "UniPC": ("#e69f00", "<"),
    "DPM-Solver++": ("#999933", ">"),
    "RES": ("#882255", "d"),
    "FlowTurbo": ("#d55e00", "o"),
    "Adams-Bashforth + refiner": ("#9c5a00", "P"),
    "exponential + refiner": ("#117733", "X"),
    "fitted": ("#000000", "p"),
    "stages": ("#56b4e9", "h"),
}
FONT: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
}


def need_matplotlib() -> None:
    """ValueError where matplotlib is missing; called before the work whose result is plotted."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'flowturbo[eval]'") from None


def plot_quality(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot the results of `evaluate` as a PNG: each distance against each cost.

    The grey staircase is the Pareto front of the plans without refiner steps. Its plans are
    labelled, and so are all plans with refiner steps, in bold where they beat the staircase. Plans
    far above the front are not drawn but listed at the top.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = sorted(results["rows"], key=lambda row: row["cost"])
    distances = (
        ("rms", f"RMS distance to {results['fine']['plan']}"),
        ("frechet", "Fréchet distance to held-out digits"),
    )
    costs = (("cost", "cost in predictor calls"), ("ms_per_image", "milliseconds an image"))
    with rc_context(FONT):
        figure = Figure(figsize=(13, 11), dpi=120, layout="constrained")
        panels = figure.subplots(2, 2, sharex="col", sharey="row")
        for line, (distance, distance_title) in zip(panels, distances, strict=True):
            for axes, (cost, cost_title) in zip(line, costs, strict=True):
                scatter(axes, rows, cost, distance)
                if distance == distances[-1][0]:
                    axes.set_xlabel(cost_title)
                    floor = results["floor"]["frechet"]
                    axes.axhline(floor, color="black", linewidth=0.8, linestyle=":", zorder=1)
                    axes.annotate(
                        "training digits",
                        (1, floor),
                        (-2, 3),
                        xycoords=axes.get_yaxis_transform(),
                        textcoords="offset points",
                        ha="right",
                    )
                if cost == costs[0][0]:
                    axes.set_ylabel(distance_title)
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
        figure.draw_without_rendering()  # labels are placed in pixels: fix the layout first
        for line, (distance, _) in zip(panels, distances, strict=True):
            for axes, (cost, _) in zip(line, costs, strict=True):
                label_points(axes, rows, cost, distance)
        save_figure(figure, path)


def scatter(axes: Any, rows: Sequence[Row], cost: str, distance: str) -> None:
    rows, above = split_far(rows, distance)
    axes.set_xscale("log")
    axes.set_yscale("log")
    staircase = sorted((row[cost], row[distance]) for row in _best_without(rows, cost, distance))
    if staircase:
        x, y = zip(*staircase, strict=True)
        end = max(row[cost] for row in rows)
        axes.step(
            [*x, end],
            [*y, y[-1]],
            where="post",
            color="#bbbbbb",
            linewidth=5,
            zorder=0,
            label="best without refiner",
        )
    for name, (colour, marker) in FAMILIES.items():
        members = [row for row in rows if row["family"] == name]
        if members:
            size = 52 if members[0]["refiner_calls"] else 26
            axes.scatter(
                [row[cost] for row in members],
                [row[distance] for row in members],
                s=size,
                color=colour,
                marker=marker,
                edgecolors="white",
                linewidths=0.6,
                label=name,
                zorder=2,
            )
    plain_ticks(axes.xaxis, (1, 1.5, 2, 3, 4, 6, 8))
    plain_ticks(axes.yaxis)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7, zorder=-1)
    axes.margins(x=0.07, y=0.07)
    if above:
        names = ", ".join(f"{name_of(row)} {row[distance]:.3g}" for row in above)
        axes.text(
            0.99,
            0.99,
            f"above the plot: {names}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color="#666666",
            parse_math=False,
        )


def split_far(rows: Sequence[Row], distance: str) -> tuple[list[Row], list[Row]]:
    """The rows to draw, and those far above the front.

    A distance of 0, the fine solution's own, has no place on a log axis.
    """
    front = pareto_front([(row["cost"], row[distance]) for row in rows])
    limit = 1.4 * max(row[distance] for row, on_front in zip(rows, front, strict=True) if on_front)
    drawn = [row for row in rows if 0 < row[distance] <= limit]
    return drawn, [row for row in rows if row[distance] > limit]


def _best_without(rows: Sequence[Row], cost: str, distance: str) -> list[Row]:
    """The Pareto front of the plans without refiner steps."""
    rivals = [row for row in rows if not row["refiner_calls"]]
    front = pareto_front([(row[cost], row[distance]) for row in rivals])
    return [row for row, on_front in zip(rivals, front, strict=True) if on_front]


def plain_ticks(axis: Any, digits: tuple[float, ...] = (1, 2, 5)) -> None:
    """Label these digits of each power of ten on a log axis, as plain decimal numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=digits, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


_OFFSETS = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]


def label_points(axes: Any, rows: Sequence[Row], cost: str, distance: str) -> None:
    """Write plan names next to their points, each where it overlaps least."""
    rows, _ = split_far(rows, distance)
    to_pixels = axes.transData.transform
    boxes = []  # occupied areas: (left, bottom, right, top) in pixels
    for row in rows:
        x, y = to_pixels((row[cost], row[distance]))
        boxes.append((x - 5, y - 5, x + 5, y + 5))
    frame = axes.bbox.extents
    front = _best_without(rows, cost, distance)
    best = {name_of(row) for row in front}
    pixels = axes.figure.dpi / 72
    for row in sorted(rows, key=lambda row: row["refiner_calls"] == 0):
        if not row["refiner_calls"] and name_of(row) not in best:
            continue
        beaten = [other[distance] for other in front if other[cost] <= row[cost]]
        bold = row["refiner_calls"] > 0 and all(row[distance] < other for other in beaten)
        size = 7.5
        width, height = (
            (0.76 if bold else 0.68) * size * len(name_of(row)) * pixels,
            1.15 * size * pixels,
        )
        x, y = to_pixels((row[cost], row[distance]))
        places = []
        for reach in (7, 16, 26):
            for i, j in _OFFSETS:
                # The label's centre, so that its near edge is `reach` points from the marker.
                mx, my = x + i * (reach * pixels + width / 2), y + j * (reach * pixels + height / 2)
                box = (mx - width / 2, my - height / 2, mx + width / 2, my + height / 2)
                outside = (
                    box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
                )
                hidden = sum(_overlap(box, other) for other in boxes) + (1e6 if outside else 0)
                places.append((hidden + 2 * reach, mx, my, box))
        _, mx, my, box = min(places)
        boxes.append(box)
        axes.annotate(
            name_of(row),
            (row[cost], row[distance]),
            ((mx - x) / pixels, (my - y) / pixels),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            color=FAMILIES[row["family"]][0],
            fontweight="bold" if bold else "normal",
            parse_math=False,
            arrowprops=dict(arrowstyle="-", color="#999999", linewidth=0.5, shrinkA=0, shrinkB=3),
        )


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area of the intersection of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def plot_velocity(results: Mapping[str, Any], path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Plot the results of `velocity_curve` as a PNG: rate of change, and cosine between times.

    path: of the file, or a binary file object.
    """
    need_matplotlib()
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    times, rate = results["times"], results["rate"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(times)]
    with rc_context(FONT):
        figure = Figure(figsize=(10.5, 4.2), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.fill_between(
            middles,
            rate["p10"],
            rate["p90"],
            color="#0072b2",
            alpha=0.2,
            linewidth=0,
            label="10th to 90th percentile",
        )
        left.plot(middles, rate["mean"], color="#0072b2", linewidth=2, label="mean over images")
        left.set_yscale("log")
        plain_ticks(left.yaxis)
        left.set_title("How fast the velocity changes")
        left.set_ylabel("|dv/dt| / |v|")
        left.legend(frameon=False)
        colours = colormaps["viridis"]
        for time, cosine in results["cosine"].items():
            right.plot(
                times, cosine, color=colours(0.9 * float(time)), linewidth=2, label=f"s = {time}"
            )
            right.plot([float(time)], [1], "o", color=colours(0.9 * float(time)), markersize=5)
        right.set_title("Is it still the velocity of another time s?")
        right.set_ylabel("cosine of the angle between v(t) and v(s)")
        right.legend(frameon=False)
        for axes in (left, right):
            axes.set_xlabel("t, from noise (0) to data (1)")
            axes.set_xlim(-0.01, 1.01)
            axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7, zorder=-1)
        save_figure(figure, path)


def save_figure(figure: Any, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write a figure as a PNG, atomically if `path` is a path. No display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
        FigureCanvasAgg(figure).print_png(file)
