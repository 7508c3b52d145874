"""The report of `flowturbo evaluate`: a table of plans and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .statistics import BLOCKS, Row, judge, pareto_front

MEASURES = {
    "rms": "RMS distance to the fine solution",
    "frechet": "Fréchet distance to held-out digits",
}


def quality_table(results: Mapping[str, Any]) -> str:
    """Results as Markdown: circumstances, the table sorted by cost, and what it says of plans with
    refiner steps.
    """
    s, e, c = results["settings"], results["environment"], results["classifier"]
    floor, fine, macs = results["floor"], results["fine"], results["model"]
    rows = sorted(results["rows"], key=lambda row: (row["cost"], row["plan"]))
    lines = [
        "# Quality against cost",
        "",
        f"Model {Path(s['model']).name}, guidance {s['guidance']:g}, {s['images']} images a plan "
        f"(seed {s['seed']}, image i is of "
        f"class i % 10), batches of {s['batch_size']}; {e['dtype']} on {e['device']}, threads: "
        f"{e['threads']}, torch {e['torch']}.",
        "",
        "- cost: predictor-call equivalents; a refiner call has "
        f"{macs['refiner_macs'] / macs['predictor_macs']:.3f} of the multiply-accumulates of a "
        "predictor call.",
        "- ms/image: of the whole plan, median over all batches but the first.",
        f"- RMS: distance a pixel (black is -1, white 1) to the {fine['plan']} solution from the "
        "same noise, over the first "
        f"{fine['images']} images.",
        f"- Fréchet: distance to {c['held_out_images']} held-out digits in the features of a "
        "small classifier, which recognises "
        f"{c['held_out_accuracy']:.1%} of them. The {floor['images']} training digits are at "
        f"{floor['frechet']:.2f}, the floor.",
        "- right class: share of images that this classifier gives the class they were made for.",
        "",
        "Bold: on the Pareto front of this distance against cost; no other plan is as cheap and "
        "better, or as good and cheaper.",
        "",
        "| plan | family | predictor calls | refiner calls | cost | ms/image | RMS | Fréchet | "
        "right class |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    fronts = {key: pareto_front([(row["cost"], row[key]) for row in rows]) for key in MEASURES}
    for i, row in enumerate(rows):
        rms, frechet = (
            f"**{row[key]:.{digits}f}**" if fronts[key][i] else f"{row[key]:.{digits}f}"
            for key, digits in (("rms", 4), ("frechet", 2))
        )
        lines.append(
            f"| {row['plan']} | {row['family']} | {row['predictor_calls']} | "
            f"{row['refiner_calls']} | {row['cost']:.2f} "
            f"| {row['ms_per_image']:.2f} | {rms} | {frechet} | {row['label_share']:.1%} |"
        )
    near = min(rows, key=lambda row: row["rms"])
    lines += [
        "",
        f"The {fine['plan']} solution itself, of {fine['images']} images, has Fréchet "
        f"{fine['frechet']:.2f} and "
        f"{fine['label_share']:.1%} of the right class. Fewer images give larger Fréchet "
        f"distances: {near['plan']}, the closest "
        f"plan, has {near['frechet_first']:.2f} over the same {fine['images']}.",
        "",
        "## Plans with refiner steps",
        "",
        *verdicts(rows),
        "",
    ]
    return "\n".join(lines)


HEUN = frozenset({"Heun", "pseudo corrector"})


ALL = HEUN | {"Euler", "Adams-Bashforth"}


RIVALS: tuple[tuple[str, frozenset[str], str, Callable[[Row], float]], ...] = (
    ("same cost", ALL, "cost", lambda row: 1.03 * row["cost"]),
    ("same cost, of H and P", HEUN, "cost", lambda row: 1.03 * row["cost"]),
    ("next whole call", ALL, "cost", lambda row: math.ceil(row["cost"])),
    ("same time", ALL, "ms_per_image", lambda row: 1.03 * row["ms_per_image"]),
)
"""Whom a plan with refiner steps is set against: plans without, of some families, of at most so
much of some cost.
"""


OUTCOMES = {
    "better": "better than",
    "level": "level with",
    "worse": "worse than",
    "no rival": "no rival as cheap",
}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For each distance, which plans with refiner steps beat every plan without at their cost, and
    which don't.
    """
    refined = [row for row in rows if row["refiner_calls"]]
    rivals = [row for row in rows if not row["refiner_calls"]]
    if not refined:
        return ["No plan here has refiner steps."]
    lines = [
        "Each is set against the best of all plans without refiner steps of at most the same cost "
        "(and 3 % more); of those, of "
        "Heun and pseudo-corrector steps alone; of all of at most its cost rounded up to whole "
        "predictor calls; and of all of at "
        "most the same milliseconds (and 3 % more). Better and worse are by more than two "
        "standard errors of the difference "
        f"(jackknife over {BLOCKS} groups of images, the same noise for both)."
    ]
    for quality, title in MEASURES.items():
        columns = []
        for _, families, cost, limit in RIVALS:
            chosen = [rival for rival in rivals if rival["family"] in families]
            columns.append([judge(row, chosen, quality, cost, limit(row)) for row in refined])
        lines += ["", f"### {title}", ""]
        for (whom, *_), column in zip(RIVALS, columns, strict=True):
            counts = []
            for outcome in OUTCOMES:
                plans = [
                    row["plan"]
                    for row, (found, _) in zip(refined, column, strict=True)
                    if found == outcome
                ]
                counts += [f"{len(plans)} {outcome} ({', '.join(plans)})"] if plans else []
            lines.append(
                f"- {whom[0].upper()}{whom[1:]}, of {len(refined)} plans: {', '.join(counts)}."
            )
        lines += [
            "",
            "| plan | cost | distance | " + " | ".join(whom for whom, *_ in RIVALS) + " |",
            "|---|--:|--:|---|---|---|---|",
        ]
        for row, *found in zip(refined, *columns, strict=True):
            cells = (
                OUTCOMES[outcome] + (f" {best['plan']} ({best[quality]:.3g})" if best else "")
                for outcome, best in found
            )
            lines.append(
                f"| {row['plan']} | {row['cost']:.2f} | {row[quality]:.3g} | {' | '.join(cells)} |"
            )
    return lines
