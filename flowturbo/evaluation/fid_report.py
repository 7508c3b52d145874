"""The report of a fidelity evaluation as text: the figures, what is to be kept in mind with them,
and all that a rerun needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}
PUBLISHED_IMAGES = 50_000
LOSSY = {".jpg", ".jpeg", ".webp"}

PROTOCOL = (
    "FID is the squared Fréchet distance of Gaussians with the means and unbiased covariances of "
    "the pool features, in float64; "
    "sFID that of the spatial features (ADM's evaluator; Nash et al. 2021).",
    "The inception score is the mean over groups of {split} images in order, of logits without "
    "bias; ± is the standard deviation.",
    "Precision and recall (Kynkäänniemi et al. 2019) take balls up to the {neighbours}rd nearest "
    "other image, by pool features, in "
    "float64. ADM's evaluator takes distances in float16 where they fit, so that its third "
    "decimal may differ.",
    "Images come as uint8 and are resized by the network's code; nothing is cropped.",
)


def fidelity_table(results: Mapping[str, Any]) -> str:
    """Of report.json's content, as text."""
    rows = results["rows"]
    shown = [metric for metric in TITLES if any(metric in row for row in rows)]
    lines = [
        "# Fidelity",
        "",
        "| samples | images | " + " | ".join(TITLES[metric] for metric in shown) + " |",
        "|---|--:|" + "--:|" * len(shown),
    ]
    lines += [
        f"| {row['samples']} | {row['images']} | "
        f"{' | '.join(_cell(row, metric) for metric in shown)} |"
        for row in rows
    ]
    if notes := warnings(results):
        lines += ["", "## To be kept in mind", "", *(f"- {note}" for note in notes)]
    lines += ["", "## What a rerun needs", ""]
    for part in ("files", "samples", "reference", "network", "environment", "settings"):
        if results[part]:
            lines.append(f"- **{part}**: {'; '.join(_told(results[part]))}")
    lines += [
        "",
        "## How it is measured",
        "",
        *(f"- {line.format(**results['protocol'])}" for line in PROTOCOL),
        "",
    ]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    if metric == "is":
        return f"{row['is']:.2f} ± {row['is_std']:.2f}"
    return f"{row[metric]:.4f}" if metric in ("precision", "recall") else f"{row[metric]:.3f}"


def _told(part: Mapping[str, Any], before: str = "") -> list[str]:
    """key value, with the keys of what is inside in front."""
    said = []
    for key, value in part.items():
        said += (
            _told(value, f"{before}{key}.")
            if isinstance(value, Mapping)
            else [f"{before}{key} {_plain(value)}"]
        )
    return said


def _plain(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What makes these figures other than published ones."""
    reference, network = results["reference"], results["network"]
    metrics = {metric for row in results["rows"] for metric in row}
    notes = []
    for count in sorted({row["images"] for row in results["rows"]}):
        widest = max(network["widths"])
        if count <= widest and metrics & {"fid", "sfid"}:
            notes.append(
                f"{count} images don't determine a covariance of {widest} features: FID and sFID "
                "are far too large."
            )
        elif count != PUBLISHED_IMAGES:
            notes.append(
                f"Published figures are of {PUBLISHED_IMAGES} images, these of {count}: FID falls "
                "with their number."
            )
        split = results["protocol"]["split"]
        if "is" in metrics and count % split:
            notes.append(
                f"The last group of the inception score has {count % split} images instead of "
                f"{split}."
            )
    if metrics & {"fid", "sfid"} and reference.get("gaussians") == "of its images":
        notes.append(
            "The reference has no mu and sigma, so FID is to the Gaussian of its "
            f"{reference['images']} images. Published figures "
            f"of ImageNet are to that of the whole training set, which ADM's file holds."
        )
    if (
        results["samples"].get("size")
        and reference.get("size")
        and results["samples"]["size"] != reference["size"]
    ):
        notes.append(
            f"Samples have {results['samples']['size']} pixels, the reference {reference['size']}."
        )
    if lossy := LOSSY & set(results["samples"].get("formats", [])):
        notes.append(
            f"Samples are stored with losses ({', '.join(sorted(lossy))}), which FID sees."
        )
    return notes
