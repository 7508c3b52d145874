"""What a search for plans found, as a table: each fitted plan against every other of its price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.statistics import BLOCKS, Row, family, jackknife_error, judge, pareto_front
from ..solver.plan import Plan
from .cost import TURNS


def described(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their groups, the standard errors of their distances, and whether they are on
    the Pareto front by RMS.
    """
    front = pareto_front([(row["price"], row["rms"]) for row in rows])
    found = []
    for row, on_front in zip(rows, front, strict=True):
        errors = {
            f"{name}_error": jackknife_error(row[f"{name}_blocks"])
            for name in ("rms", "frechet")
            if name in row
        }
        found.append({**row, "group": group(row), "on_front": on_front, **errors})
    return found


def group(row: Row) -> str:
    """What a row is called in the table and the plot: how it was found, or its family."""
    if row["how"] == "fitted":
        return "fitted, with refiner steps" if row["refiner_calls"] else "fitted"
    if row["how"] == "searched":
        return "unfitted, searched"
    if row["how"] != "published":
        return row["how"].split("-")[0]
    return family(Plan.from_record(row["record"]))


MARGINS = {"price": 1.005, "ms_per_image": 1.03}
"""A rival that costs up to so much as much as a plan is held to cost the same."""


def against(
    row: Row, rivals: Sequence[Row], measure: str, cost: str = "price"
) -> tuple[str, Row | None]:
    """`judge` against the rivals of at most about its cost."""
    return judge(row, rivals, measure, cost, MARGINS[cost] * row[cost])


def front_table(results: Mapping[str, Any]) -> str:
    """Results as Markdown: circumstances, what steps cost, fitted plans against the others, and all
    plans.
    """
    s, e = results["settings"], results["environment"]
    rows = sorted(results["rows"], key=lambda row: (row["price"], row["rms"]))
    unit = "ms" if s["budget_ms"] is not None else "calls"
    budget = (
        f"{s['budget_ms']:g} ms an image"
        if s["budget_ms"] is not None
        else f"{s['budget_calls']:g} predictor calls"
    )
    frechet = "frechet" in rows[0]
    costs = ", ".join(f"{letter} {cost:.3g}" for letter, cost in results["costs"].items())
    lines = [
        "# Plans found by search",
        "",
        f"Model {Path(s['model']).name}, guidance {s['guidance']:g}, budget {budget}; "
        f"{e['dtype']} on {e['device']}, threads: "
        f"{e['threads']}, torch {e['torch']}.",
        "",
        f"- Fitted on {s['calibration_images']} images of their own, measured on {s['images']} "
        f"others (seed {s['seed']}, image i "
        'is of class i % number of classes). The last classes have no part in the fit; "held '
        'classes" is the distance over '
        "their images alone.",
        f"- RMS: distance a value to the {s['reference_plan']} solution from the same noise, with "
        "its standard error (jackknife "
        f"over {BLOCKS} groups of images).",
        "- cost: predictor calls, a refiner call counted by its share of multiply-accumulates."
        if unit == "calls"
        else "- cost: milliseconds an image, from the measured cost of each kind of step.",
        f"- ms: measured, an image of the whole plan in batches of {s['batch_size']}: the fastest "
        f"of {TURNS} runs in which plans "
        f"take turns. A plan that takes up to {100 * (MARGINS['ms_per_image'] - 1):.0f} % more "
        "counts as equally fast.",
    ]
    if frechet:
        fine = results["kept"].get("fine frechet")
        lines.append(
            "- Fréchet: distance to held-out digits in a small classifier's features; the fine "
            f"solution's is {fine:.2f}."
        )
    lines += [
        f"- Steps cost here, in milliseconds an image: {costs}.",
        "",
        "## Fitted plans against all others of at most their cost",
        "",
        *_verdicts(rows, frechet),
        "",
        "## All plans",
        "",
        "Bold: no other plan is as cheap and nearer, or as near and cheaper.",
        "",
        f"| plan | what | cost | ms | RMS | held classes |{' Fréchet |' if frechet else ''}",
        f"|---|---|--:|--:|--:|--:|{'--:|' if frechet else ''}",
    ]
    for row in rows:
        rms = _bold(f"{row['rms']:.4f} ± {row['rms_error']:.4f}", row["on_front"])
        held = "" if row["rms_held"] is None else f"{row['rms_held']:.4f}"
        line = (
            f"| {row['plan']} | {row['group']} | {row['price']:.2f} | "
            f"{row['ms_per_image']:.2f} | {rms} | {held} |"
        )
        lines.append(
            line + (f" {row['frechet']:.2f} ± {row['frechet_error']:.2f} |" if frechet else "")
        )
    return "\n".join(lines) + "\n"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _verdicts(rows: Sequence[Row], frechet: bool) -> list[str]:
    """For each fitted plan and each distance, the best other plan of at most its cost, and of each
    kind the best.
    """
    fitted = [row for row in rows if row["how"] == "fitted"]
    others = [row for row in rows if row["how"] != "fitted"]
    if not fitted:
        return ["The budget leaves no fitted plan."]
    lines: list[str] = []
    for measure, title in (
        ("rms", "RMS to the fine solution"),
        *([("frechet", "Fréchet distance")] if frechet else []),
    ):
        lines += [
            *([""] if lines else []),
            f"### {title}",
            "",
            "| plan | cost | distance | best published | best published as fast in ms | best of "
            "all unfitted, grids searched |",
            "|---|--:|--:|---|---|---|",
        ]
        for row in fitted:
            cells = []
            unsearched = [r for r in others if r["how"] != "searched"]
            for rivals, cost in (
                (unsearched, "price"),
                (unsearched, "ms_per_image"),
                (others, "price"),
            ):
                outcome, best = against(row, rivals, measure, cost)
                cells.append(
                    outcome
                    if best is None
                    else f"{outcome}: {best['plan']} ({best['group']}) {best[measure]:.4g}"
                )
            lines.append(
                f"| {row['plan']} | {row['price']:.2f} | {row[measure]:.4g} | {' | '.join(cells)} |"
            )
    return lines
