"""The report of `flowturbo evaluate --data`: which plan to take at which cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .quality_report import verdicts
from .statistics import (
    BLOCKS,
    Row,
    cell_of,
    difference_error,
    pareto_front,
    value_error,
)

TITLES = {
    "rms": "RMS distance to the fine solution",
    "frechet": "Fréchet distance to the training set",
    "kid": "Kernel distance to the training set",
    "frechet_held": "Fréchet distance to held-out pictures",
    "kid_held": "Kernel distance to held-out pictures",
}
"""The distances, by their keys in rows. Smaller is better."""
SHORT = {
    "rms": "RMS",
    "frechet": "Fréchet",
    "kid": "kernel",
    "frechet_held": "Fréchet, held out",
    "kid_held": "kernel, held out",
}
SCALE = {"kid": 1000, "kid_held": 1000}
"""Factors by which values are multiplied in tables."""
DECIMALS = {"rms": 4, "frechet": 3, "kid": 2, "frechet_held": 3, "kid_held": 2}
MARGIN = 1.005
"""Costs within this factor count as equal."""


def class_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: provenance, then for each guidance scale the plans by cost."""
    rows = sorted(results["rows"], key=lambda row: (row["cost"], cell_of(row)))
    scales = sorted({row["guidance"] for row in rows})
    own = own_precision(results, rows)
    lines = ["# Quality against cost", "", *_legend(results), ""]
    for scale in scales:
        all_here = [row for row in rows if row["guidance"] == scale]
        here = [row for row in own if row["guidance"] == scale]
        lines += [f"## Guidance {scale:g}", "", "### Which plan to take", "", *advice(here), ""]
        lines += ["### All plans", "", *_table(all_here), ""]
        if others := [row for row in all_here if row not in here]:
            lines += ["### Other precisions", "", *_precisions(others, here), ""]
        lines += ["### Against the best that costs no more", "", *_differences(here), ""]
        if any(row["refiner_calls"] for row in here):
            titles = {key: TITLES[key] for key in ("rms", "frechet", "kid")}
            # Sections of a section.
            texts = [
                f"#{line}" if line.startswith("###") else line for line in verdicts(here, titles)
            ]
            lines += ["### Plans with refiner steps", "", *texts, ""]
    if len(scales) > 1:
        lines += ["## Guidance scales", "", *_scales(own, scales), ""]
    return "\n".join(lines)


def own_precision(results: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """The rows in the report's own precision, or all if there is none in it.

    Plans are compared among these: the others differ from them by little but their time.
    """
    return [row for row in rows if row["precision"] == results["precision"]] or list(rows)


def measures_of(rows: Sequence[Row]) -> list[str]:
    """The distances that all of these rows have."""
    return [key for key in TITLES if all(key in row for row in rows)]


def _legend(results: Mapping[str, Any]) -> Iterator[str]:
    """Provenance of the figures, and what each column means."""
    s, e, found, macs = (results[k] for k in ("settings", "environment", "references", "model"))
    yield (
        f"Model {Path(s['model']).name}, {s['images']} images per plan (seed {s['seed']}), classes "
        f"in the shares of the training set's {found['training_images']} pictures, batches of "
        f"{s['batch_size']}; {results['precision']} where nothing else is said, on {e['device']}, "
        f"threads: {e['threads']}, torch {e['torch']}."
    )
    yield ""
    yield (
        "- cost: in predictor calls of a whole image. A refiner call counts as "
        f"{macs['refiner_macs'] / macs['predictor_macs']:.3f}, its share of the "
        "multiply-accumulates; a call outside the guidance interval as half of one inside; a call "
        "of a stage as its share of the image's values."
    )
    yield "- ms/image: time of the whole plan, median over all batches but the first."
    yield (
        f"- RMS: distance per value (black is -1, white 1) to the {results['fine']['plan']} "
        f"solution in float32 from the same noise, guided at all times, over the first "
        f"{results['fine']['images']} images."
    )
    yield (
        "- Fréchet, kernel: distances in the features of a small classifier that was trained on "
        "the training set" + _accuracy(found) + _classes(results["rows"], found)
    )
    yield (
        "- kernel: KID times 1000, the unbiased squared MMD with kernel (x . y / width + 1)^3. In "
        "the mean it does not depend on the number of pictures; by chance it may be below 0."
    )
    if found["held_out_images"]:
        yield _held_out(found)
    yield "- right class: share of images that the classifier assigns to the class asked for."
    yield (
        "- nearest: RMS per value to the nearest training picture, mirrored or not, median and "
        "least hundredth." + _nearest(found)
    )
    yield ""
    yield (
        f"± is one standard error, by the jackknife over {BLOCKS} blocks of images. Bold: on the "
        "Pareto front of this distance against cost."
    )


def _accuracy(found: Mapping[str, Any]) -> str:
    if not found["held_out_images"]:
        return "; without held-out pictures its accuracy is not known."
    return (
        f"; it recognises {found['held_out_accuracy']:.1%} of {found['held_out_images']} held-out "
        f"pictures ({found['held_out_accuracy_by_class']:.1%} in the mean over their classes)."
    )


def _classes(rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    fewest = min(row["classes"] for row in rows)
    if fewest == found["training_classes"]:
        return ""
    return (
        f" Only the {fewest} classes with two samples or more are compared, of "
        f"{found['training_classes']}."
    )


def _held_out(found: Mapping[str, Any]) -> str:
    text = (
        "- held out: the same distances to the held-out pictures, weighted to the training set's "
        "class shares, of the classes with two of them or more. The error is that of samples and, "
        "as if they had been held out one by one, of held-out pictures."
    )
    floor = found["training_to_held_out"]
    if not floor:
        return text
    return text + (
        f" The training set itself is at {floor['frechet_held']:.3f}, kernel "
        f"{_figure(floor, 'kid_held')}."
    )


def _nearest(found: Mapping[str, Any]) -> str:
    if not found["held_out_images"]:
        return ""
    near = found["held_out_nearest"]
    return (
        f" Held-out pictures have {near['0.5']:.3f} and {near['0.01']:.3f}. nearer: share of "
        f"samples, weighted to their class shares, that are nearer than {near['0.05']:.3f}, as 5 % "
        "of the held-out pictures are; a share far above that would show memorised pictures."
    )


def _figure(row: Row, key: str) -> str:
    factor, digits = SCALE.get(key, 1), DECIMALS[key]
    return f"{factor * row[key]:.{digits}f} ± {factor * value_error(row, key):.{digits}f}"


def best_within(rows: Sequence[Row], key: str, cost: float) -> tuple[Row | None, list[Row]]:
    """The best row that costs at most `cost`, and those that are level with it, best first.

    Level: within two standard errors of the difference.
    """
    affordable = [row for row in rows if row["cost"] <= MARGIN * cost]
    if not affordable:
        return None, []
    best = min(affordable, key=lambda row: row[key])
    level = [
        row
        for row in affordable
        if row is not best and row[key] - best[key] <= 2 * difference_error(row, best, key)
    ]
    return best, sorted(level, key=lambda row: row[key])


def advice(rows: Sequence[Row]) -> Iterator[str]:
    """A table: at each cost where it changes, the best plan by each distance, and those level."""
    keys = [key for key in measures_of(rows) if key in ("rms", "frechet", "kid")]
    yield (
        "The best plan that costs at most this many calls, by each distance; in brackets those "
        "that are level with it, within two standard errors of the difference from the same noise."
    )
    yield ""
    yield f"| calls | {' | '.join(SHORT[key] for key in keys)} |"
    yield "|--:|" + "---|" * len(keys)
    before: list[Row | None] = []
    for cost in sorted({row["cost"] for row in rows}):
        found = [best_within(rows, key, cost) for key in keys]
        if [best for best, _ in found] != before:
            before = [best for best, _ in found]
            yield f"| {cost:.2f} | {' | '.join(map(_choice, keys, found))} |"


def _choice(key: str, found: tuple[Row | None, list[Row]]) -> str:
    best, level = found
    if best is None:
        return ""
    others = ", ".join(cell_of(row) for row in level[:3]) + (", ..." if len(level) > 3 else "")
    return f"{cell_of(best)} {_figure(best, key)}" + (f" ({others})" if level else "")


def _table(rows: Sequence[Row]) -> Iterator[str]:
    keys = measures_of(rows)
    fronts = {key: pareto_front([(row["cost"], row[key]) for row in rows]) for key in keys}
    nearer = all("nearer_share" in row for row in rows)
    yield (
        "| plan | family | predictor calls | refiner calls | cost | ms/image | "
        f"{' | '.join(SHORT[key] for key in keys)} | right class | nearest |"
        + (" nearer |" if nearer else "")
    )
    yield "|---|---|" + "--:|" * (6 + len(keys) + nearer)
    for i, row in enumerate(rows):
        figures = (
            f"**{_figure(row, key)}**" if fronts[key][i] else _figure(row, key) for key in keys
        )
        yield (
            f"| {cell_of(row)} | {row['family']} | {row['predictor_calls']} | "
            f"{row['refiner_calls']} | {row['cost']:.2f} | {_time(row)} | "
            f"{' | '.join(figures)} | {row['label_share']:.1%} ± "
            f"{value_error(row, 'label_share'):.1%} | "
            f"{row['nearest']['0.5']:.3f}, {row['nearest']['0.01']:.3f} |"
            + (f" {row['nearer_share']:.1%} |" if nearer else "")
        )


def _time(row: Row) -> str:
    """Milliseconds per image, if the plan was timed."""
    return "" if row["ms_per_image"] is None else f"{row['ms_per_image']:.2f}"


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    """Each plan's lead over the best other one that costs no more, with its standard error."""
    keys = measures_of(rows)
    yield (
        "The plan's distance less that of the best other plan that costs no more, from the same "
        "noise: below 0 it is better. Bold: by more than two standard errors."
    )
    yield ""
    yield f"| plan | cost | {' | '.join(SHORT[key] for key in keys)} |"
    yield "|---|--:|" + "---|" * len(keys)
    for row in rows:
        others = [other for other in rows if other is not row]
        cells = (_difference(row, best_within(others, key, row["cost"])[0], key) for key in keys)
        yield f"| {cell_of(row)} | {row['cost']:.2f} | {' | '.join(cells)} |"


def _difference(row: Row, other: Row | None, key: str) -> str:
    if other is None:
        return "the cheapest"
    factor, digits = SCALE.get(key, 1), DECIMALS[key]
    difference, error = row[key] - other[key], difference_error(row, other, key)
    text = f"{factor * difference:+.{digits}f} ± {factor * error:.{digits}f}"
    marked = f"**{text}**" if abs(difference) > 2 * error else text
    return f"{marked} ({cell_of(other)})"


def _precisions(rows: Sequence[Row], own: Sequence[Row]) -> Iterator[str]:
    """Each row's difference from that of the same plan in the report's own precision."""
    keys = measures_of(rows)
    yield f"The distance less that of the same plan in {own[0]['precision']}."
    yield ""
    yield f"| plan | ms/image | {' | '.join(SHORT[key] for key in keys)} |"
    yield "|---|--:|" + "---|" * len(keys)
    for row in rows:
        same = [other for other in own if other["record"] == row["record"]]
        if same:
            cells = (_difference(row, same[0], key) for key in keys)
            yield f"| {cell_of(row)} | {_time(row)} | {' | '.join(cells)} |"


def _scales(rows: Sequence[Row], scales: Sequence[float]) -> Iterator[str]:
    """Each plan at each scale, by the distances that can be compared between scales."""
    keys = [key for key in measures_of(rows) if key != "rms"]
    found = {(cell_of(row), row["guidance"]): row for row in rows}
    counts = Counter(name for name, _ in found)
    names = [name for name, count in counts.items() if count > 1]
    for number, key in enumerate(keys):
        yield from ["", f"### {TITLES[key]}", ""] if number else [f"### {TITLES[key]}", ""]
        yield f"| plan | {' | '.join(f'guidance {scale:g}' for scale in scales)} |"
        yield "|---|" + "--:|" * len(scales)
        for name in names:
            here = [found.get((name, scale)) for scale in scales]
            least = min(row[key] for row in here if row is not None)
            cells = (
                ""
                if row is None
                else f"**{_figure(row, key)}**"
                if row[key] == least
                else _figure(row, key)
                for row in here
            )
            yield f"| {name} | {' | '.join(cells)} |"
