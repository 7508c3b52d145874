"""What `flowturbo tune` reports of several budgets: for each, its plan against every scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.statistics import Row, difference_error, jackknife_error

ENOUGH = 2.0
"""Standard errors of the difference from which on one of two plans counts as better."""


def chosen(budget: float, rows: Sequence[Row]) -> Row | None:
    """The own plan within the budget that errs least on the calibration noise."""
    own = [r for r in rows if "calibration_rms" in r and r["price"] <= budget + 1e-9]
    return min(own, key=lambda row: float(row["calibration_rms"])) if own else None


def compared(budget: float, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The plan of one budget beside the best plan of every published scheme within the budget.

    rows: those of tuning.json. The plan is chosen on calibration noise; a scheme's is the one with
    the least distance on the noise that all are measured on, which favours the scheme.
    standard_errors: the gain over the standard error of that difference, from the same noise.
    None without a plan of at most the budget.
    """
    best = chosen(budget, rows)
    if best is None:
        return None
    schemes: dict[str, Row] = {}
    for row in rows:
        if "calibration_rms" in row or row["price"] > budget + 1e-9:
            continue
        if row["group"] not in schemes or row["rms"] < schemes[row["group"]]["rms"]:
            schemes[row["group"]] = row
    rivals = [_against(best, row) for row in sorted(schemes.values(), key=lambda row: row["rms"])]
    return {
        "budget": budget,
        "plan": best["plan"],
        "how": best["how"],
        "file": file_name(budget),
        **{key: best[key] for key in ("price", "predictor_calls", "refiner_calls")},
        **{key: best[key] for key in ("rms", "rms_error", "rms_held", "calibration_rms")},
        "rivals": rivals,
        "better_than_all": all(rival["outcome"] == "better" for rival in rivals),
    }


def file_name(budget: float) -> str:
    """The file of a budget's plan: "best-3.json"."""
    return f"best-{budget:g}.json"


def _against(best: Row, rival: Row) -> dict[str, Any]:
    gain, error = rival["rms"] - best["rms"], difference_error(best, rival, "rms")
    errors = gain / error if error else math.copysign(1e9, gain) if gain else 0.0
    held = None
    if best["rms_held"] is not None:
        held = _share(rival["rms_held"] - best["rms_held"], rival["rms_held"])
    return {
        "scheme": rival["group"],
        "plan": rival["plan"],
        "price": rival["price"],
        "rms": rival["rms"],
        "rms_error": jackknife_error(rival["rms_blocks"]),
        "gain": gain,
        "gain_share": _share(gain, rival["rms"]),
        "gain_error": error,
        "standard_errors": errors,
        "gain_share_held": held,
        "outcome": "better" if errors > ENOUGH else "worse" if errors < -ENOUGH else "level",
    }


def _share(gain: float, of: float) -> float:
    """gain / of; of a rival that is the fine solution itself minus infinity, or 0 if level."""
    return gain / of if of else -math.inf if gain else 0.0


def budget_table(budgets: Sequence[Mapping[str, Any]]) -> list[str]:
    """The comparisons as Markdown: one line a budget, then one table a budget."""
    lines = [
        "## Budgets",
        "",
        "The plan of a budget is the one with the least error on the calibration noise. The others "
        "are the best plan of each scheme within the budget on the noise of the measurement, which "
        "favours them. SE: the gain in standard errors of the difference, from the same noise.",
        "",
        "| budget | plan | cost | RMS | held classes | best published | RMS | nearer by | SE | "
        "better than every scheme |",
        "|--:|---|--:|--:|--:|---|--:|--:|--:|---|",
    ]
    for b in budgets:
        held = "" if b["rms_held"] is None else f"{b['rms_held']:.4f}"
        start = (
            f"| {b['budget']:g} | {b['plan']} | {b['price']:.2f} | {b['rms']:.4f} ± "
            f"{b['rms_error']:.4f} | {held} |"
        )
        if not b["rivals"]:
            lines.append(f"{start} none | | | | |")
            continue
        r = b["rivals"][0]
        others = [rival["scheme"] for rival in b["rivals"] if rival["outcome"] != "better"]
        lines.append(
            f"{start} {r['plan']} ({r['scheme']}) | {r['rms']:.4f} | {r['gain_share']:.0%} | "
            f"{r['standard_errors']:.1f} | {'no: ' + ', '.join(others) if others else 'yes'} |"
        )
    for b in budgets:
        lines += [
            "",
            f"### {b['budget']:g} predictor calls: {b['plan']} against",
            "",
            "| scheme | plan | cost | RMS | nearer by | SE | nearer by, held classes | outcome |",
            "|---|---|--:|--:|--:|--:|--:|---|",
        ]
        for r in b["rivals"]:
            held = "" if r["gain_share_held"] is None else f"{r['gain_share_held']:.0%}"
            lines.append(
                f"| {r['scheme']} | {r['plan']} | {r['price']:.2f} | {r['rms']:.4f} ± "
                f"{r['rms_error']:.4f} | {r['gain_share']:.0%} | {r['standard_errors']:.1f} | "
                f"{held} | {r['outcome']} |"
            )
    return lines
