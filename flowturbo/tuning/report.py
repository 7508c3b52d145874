"""The report of `flowturbo tune`: each fitted plan against the other plans of at most its cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.statistics import BLOCKS, Row, family, jackknife_error, judge, pareto_front
from ..solver.plan import Plan
from .budgets import budget_table
from .cost import TURNS


def described(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their groups, standard errors of the distances, and the Pareto front by RMS."""
    front = pareto_front([(row["price"], row["rms"]) for row in rows])
    results = []
    for row, on_front in zip(rows, front, strict=True):
        errors = {
            f"{name}_error": jackknife_error(row[f"{name}_blocks"])
            for name in ("rms", "frechet")
            if name in row
        }
        results.append({**row, "group": group(row), "on_front": on_front, **errors})
    return results


def group(row: Row) -> str:
    """The name of a row's group in the table and the plot: how it was found, or its family."""
    if row["how"] == "fitted":
        return "fitted, with refiner steps" if row["refiner_calls"] else "fitted"
    if row["how"] == "searched":
        return "unfitted, searched"
    if row["how"] != "published":
        return row["how"].split("-")[0]
    return family(Plan.from_record(row["record"]))


HELD = {"last": "The last classes", "spread": "Some classes, evenly spread,"}
MARGINS = {"price": 1.005, "ms_per_image": 1.03}
"""Costs within these factors count as equal."""


def against(
    row: Row, rivals: Sequence[Row], measure: str, cost: str = "price"
) -> tuple[str, Row | None]:
    """`judge` against the rivals of at most the same cost, up to MARGINS."""
    return judge(row, rivals, measure, cost, MARGINS[cost] * row[cost])


def front_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: provenance, fitted plans against the others, and all plans."""
    rows = sorted(results["rows"], key=lambda row: (row["price"], row["rms"]))
    frechet = "frechet" in rows[0]
    lines = [
        "# Plans found by search",
        "",
        *_legend(results, frechet),
        "",
        *([*budget_table(results["budgets"]), ""] if results.get("budgets") else []),
        "## Fitted plans against all others of at most their cost",
        "",
        *_verdicts(rows, frechet),
        "",
        "## All plans",
        "",
        "Bold: no other plan is as cheap and nearer, or as near and cheaper.",
        "",
        *_table(rows, frechet),
    ]
    return "\n".join(lines) + "\n"


def _legend(results: Mapping[str, Any], frechet: bool) -> list[str]:
    """Provenance of the figures, and what each column means."""
    s, e = results["settings"], results["environment"]
    in_calls = s["budget_ms"] is None
    timed = bool(results["costs"])
    budgets = [b["budget"] for b in results.get("budgets", [])] or [s["budget_calls"]]
    budget = (
        f"{', '.join(f'{b:g}' for b in budgets)} predictor calls"
        if in_calls
        else f"{s['budget_ms']:g} ms per image"
    )
    costs = ", ".join(f"{letter} {cost:.3g}" for letter, cost in results["costs"].items())
    lines = [
        f"Model {Path(s['model']).name}, guidance {s['guidance']:g}, budget {budget}; "
        f"{e['dtype']} on {e['device']}, threads: {e['threads']}, torch {e['torch']}.",
        "",
        f"- Plans are fitted on {s['calibration_images']} calibration images and measured on "
        f"{s['images']} others (seed {s['seed']}, image i has class i % number of classes). "
        f"{HELD[s.get('held', 'last')]} are held out of the calibration; "
        '"held classes" is the distance over their images alone.',
        f"- RMS: distance per value to the {s['reference_plan']} solution from the same noise, "
        f"± its standard error (jackknife over {BLOCKS} blocks of images).",
        "- cost: in predictor calls (NFE); a refiner call counts as its share of "
        "multiply-accumulates."
        if in_calls
        else "- cost: milliseconds per image, from the measured cost of each kind of step.",
    ]
    if timed:
        lines.append(
            f"- ms: milliseconds per image of the whole plan in batches of {s['batch_size']}, the "
            f"fastest of {TURNS} runs in which the plans take turns. Plans within "
            f"{100 * (MARGINS['ms_per_image'] - 1):.0f} % count as equally fast."
        )
    if frechet:
        lines.append(
            "- Fréchet: distance to held-out digits in the features of a small classifier; that of "
            f"the fine solution is {results['kept'].get('fine frechet'):.2f}."
        )
    if timed:
        lines.append(f"- Cost of each kind of step here, in milliseconds per image: {costs}.")
    return lines


def _table(rows: Sequence[Row], frechet: bool) -> Iterator[str]:
    yield f"| plan | group | cost | ms | RMS | held classes |{' Fréchet |' if frechet else ''}"
    yield f"|---|---|--:|--:|--:|--:|{'--:|' if frechet else ''}"
    for row in rows:
        rms = f"{row['rms']:.4f} ± {row['rms_error']:.4f}"
        rms = f"**{rms}**" if row["on_front"] else rms
        held = "" if row["rms_held"] is None else f"{row['rms_held']:.4f}"
        line = (
            f"| {row['plan']} | {row['group']} | {row['price']:.2f} | "
            f"{_milliseconds(row)} | {rms} | {held} |"
        )
        yield line + (f" {row['frechet']:.2f} ± {row['frechet_error']:.2f} |" if frechet else "")


def _milliseconds(row: Row) -> str:
    return f"{row['ms_per_image']:.2f}" if "ms_per_image" in row else ""


def _verdicts(rows: Sequence[Row], frechet: bool) -> list[str]:
    """For each distance, every fitted plan against the best rivals of at most its cost."""
    fitted = [row for row in rows if row["how"] == "fitted"]
    others = [row for row in rows if row["how"] != "fitted"]
    published = [row for row in others if row["how"] != "searched"]
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
            "| plan | cost | distance | best published of the same cost | best published as fast "
            "in ms | best unfitted, grids searched |",
            "|---|--:|--:|---|---|---|",
        ]
        for row in fitted:
            cells = []
            for rivals, cost in (
                (published, "price"),
                (published, "ms_per_image"),
                (others, "price"),
            ):
                if cost not in row:
                    cells.append("not timed")
                    continue
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
