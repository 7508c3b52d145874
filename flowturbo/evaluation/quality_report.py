"""The report of `flowturbo evaluate`: a table of plans, and what refiner steps gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .statistics import BLOCKS, Row, cell_of, judge, pareto_front

MEASURES = {
    "rms": "RMS distance to the fine solution",
    "frechet": "Fréchet distance to held-out digits",
}


def quality_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: provenance, the plans by cost, and verdicts on refiner steps."""
    rows = sorted(results["rows"], key=lambda row: (row["cost"], row["plan"]))
    lines = [
        "# Quality against cost",
        "",
        *_legend(results),
        "",
        "| plan | family | predictor calls | refiner calls | cost | ms/image | RMS | Fréchet | "
        "right class |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *_table(rows),
        "",
        _fine_solution(results["fine"], rows),
        "",
        "## Plans with refiner steps",
        "",
        *verdicts(rows),
        "",
    ]
    return "\n".join(lines)


def _legend(results: Mapping[str, Any]) -> list[str]:
    """Provenance of the figures, and what each column means."""
    s, e, c = results["settings"], results["environment"], results["classifier"]
    floor, fine, macs = results["floor"], results["fine"], results["model"]
    return [
        f"Model {Path(s['model']).name}, guidance {s['guidance']:g}, {s['images']} images per plan "
        f"(seed {s['seed']}, image i has class i % 10), batches of {s['batch_size']}; "
        f"{e['dtype']} on {e['device']}, threads: {e['threads']}, torch {e['torch']}.",
        "",
        "- cost: in predictor calls (NFE); a refiner call counts as "
        f"{macs['refiner_macs'] / macs['predictor_macs']:.3f}, its share of the "
        "multiply-accumulates of a predictor call.",
        "- ms/image: time of the whole plan, median over all batches but the first.",
        f"- RMS: distance per pixel (black is -1, white 1) to the {fine['plan']} solution from the "
        f"same noise, over the first {fine['images']} images.",
        f"- Fréchet: distance to {c['held_out_images']} held-out digits in the features of a "
        f"small classifier, which recognises {c['held_out_accuracy']:.1%} of them. The "
        f"{floor['images']} training digits are at {floor['frechet']:.2f}, the floor.",
        "- right class: share of images that this classifier assigns to the class they were "
        "sampled for.",
        "",
        "Bold: on the Pareto front of this distance against cost; no other plan is as cheap and "
        "better, or as good and cheaper.",
    ]


def _table(rows: Sequence[Row]) -> Iterator[str]:
    fronts = {key: pareto_front([(row["cost"], row[key]) for row in rows]) for key in MEASURES}
    for i, row in enumerate(rows):
        rms, frechet = (
            f"**{row[key]:.{digits}f}**" if fronts[key][i] else f"{row[key]:.{digits}f}"
            for key, digits in (("rms", 4), ("frechet", 2))
        )
        yield (
            f"| {row['plan']} | {row['family']} | {row['predictor_calls']} | "
            f"{row['refiner_calls']} | {row['cost']:.2f} "
            f"| {row['ms_per_image']:.2f} | {rms} | {frechet} | {row['label_share']:.1%} |"
        )


def _fine_solution(fine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    nearest = min(rows, key=lambda row: row["rms"])
    return (
        f"The {fine['plan']} solution itself, over {fine['images']} images, has Fréchet distance "
        f"{fine['frechet']:.2f} and {fine['label_share']:.1%} of its images in the right class. "
        f"Fewer images give larger Fréchet distances: {nearest['plan']}, the nearest plan, has "
        f"{nearest['frechet_first']:.2f} over the same {fine['images']}."
    )


HEUN = frozenset({"Heun", "pseudo corrector"})
ALL = HEUN | {"Euler", "Adams-Bashforth", "UniPC", "DPM-Solver++", "RES", "fitted", "stages"}


RIVALS: tuple[tuple[str, frozenset[str], str, Callable[[Row], float]], ...] = (
    ("same cost", ALL, "cost", lambda row: 1.03 * row["cost"]),
    ("same cost, of H and P", HEUN, "cost", lambda row: 1.03 * row["cost"]),
    ("next whole call", ALL, "cost", lambda row: math.ceil(row["cost"])),
    ("same time", ALL, "ms_per_image", lambda row: 1.03 * row["ms_per_image"]),
)
"""Comparisons of a plan with refiner steps with plans without: name, families of the rivals, the
key of the cost, and the limit on it.
"""


OUTCOMES = {
    "better": "better than",
    "level": "level with",
    "worse": "worse than",
    "no rival": "no rival as cheap",
}


def verdicts(rows: Sequence[Row], measures: Mapping[str, str] = MEASURES) -> list[str]:
    """For each distance, which plans with refiner steps beat all plans without at the same cost.

    measures: a title for each distance's key. Times are compared if all plans were timed.
    """
    refined = [row for row in rows if row["refiner_calls"]]
    rivals = [row for row in rows if not row["refiner_calls"]]
    if not refined:
        return ["No plan here has refiner steps."]
    timed = all(row["ms_per_image"] is not None for row in rows)
    comparisons = RIVALS if timed else RIVALS[:-1]
    by_time = "; and with the best that takes no more milliseconds (plus 3 %)" * timed
    lines = [
        "Each plan with refiner steps is compared with the best plan without them that costs no "
        "more (plus 3 %); with the best such plan of Heun and pseudo-corrector steps alone; with "
        "the best whose cost is at most its own rounded up to whole predictor calls"
        f"{by_time}. Better and worse mean by more than two standard errors of the difference "
        f"(jackknife over {BLOCKS} blocks of images, the same noise for both)."
    ]
    for quality, title in measures.items():
        columns = []
        for _, families, cost, limit in comparisons:
            members = [rival for rival in rivals if rival["family"] in families]
            columns.append([judge(row, members, quality, cost, limit(row)) for row in refined])
        lines += ["", f"### {title}", ""]
        for (name, *_), column in zip(comparisons, columns, strict=True):
            counts = []
            for outcome in OUTCOMES:
                plans = [
                    cell_of(row)
                    for row, (verdict, _) in zip(refined, column, strict=True)
                    if verdict == outcome
                ]
                counts += [f"{len(plans)} {outcome} ({', '.join(plans)})"] if plans else []
            lines.append(
                f"- {name[0].upper()}{name[1:]}, of {len(refined)} plans: {', '.join(counts)}."
            )
        lines += [
            "",
            "| plan | cost | distance | " + " | ".join(name for name, *_ in comparisons) + " |",
            "|---|--:|--:|" + "---|" * len(comparisons),
        ]
        for row, *results in zip(refined, *columns, strict=True):
            cells = (
                OUTCOMES[outcome] + (f" {cell_of(best)} ({best[quality]:.3g})" if best else "")
                for outcome, best in results
            )
            lines.append(
                f"| {cell_of(row)} | {row['cost']:.2f} | {row[quality]:.3g} | {' | '.join(cells)} |"
            )
    return lines
