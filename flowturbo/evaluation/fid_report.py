"""The report of `flowturbo fid`: scores, deviations from the published protocol, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}
PUBLISHED_IMAGES = 50_000
LOSSY = {".jpg", ".jpeg", ".webp"}

PROTOCOL = (
    "FID is the squared Fréchet distance of Gaussians with the means and unbiased covariances of "
    "the pool features, in float64; sFID is that of the spatial features (ADM's evaluator; Nash et "
    "al. 2021).",
    "The inception score is the mean over splits of {split} images in order, from logits without "
    "bias; ± is the standard deviation over the splits.",
    "Precision and recall (Kynkäänniemi et al. 2019) use balls up to the {neighbours}rd nearest "
    "other image in the pool features, in float64. ADM's evaluator computes distances in float16 "
    "where they fit, so its third decimal may differ.",
    "Images are uint8 and resized by the network's code; nothing is cropped.",
)


def fidelity_table(results: Mapping[str, Any]) -> str:
    """The content of report.json as Markdown."""
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
        lines += ["", "## Deviations from published scores", "", *(f"- {note}" for note in notes)]
    lines += ["", "## Provenance", ""]
    for part in ("files", "samples", "reference", "network", "environment", "settings"):
        if results[part]:
            lines.append(f"- **{part}**: {'; '.join(_key_values(results[part]))}")
    lines += [
        "",
        "## Protocol",
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


def _key_values(part: Mapping[str, Any], prefix: str = "") -> list[str]:
    """["key value", "outer.inner value", ...]"""
    texts = []
    for key, value in part.items():
        texts += (
            _key_values(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [f"{prefix}{key} {_plain(value)}"]
        )
    return texts


def _plain(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Any deviation from the published protocol, one sentence each."""
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
                "as the number of images grows."
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
            f"{reference['images']} images. Published figures for ImageNet are to the Gaussian of "
            "the whole training set, which ADM's file holds."
        )
    elif metrics & {"fid", "sfid"} and reference.get("gaussians"):
        notes.append(
            "The reference's mu and sigma are of unknown origin: its file does not say which "
            "images and which network they are of. FID is right only if that is this network."
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
            f"Samples are stored with losses ({', '.join(sorted(lossy))}), which change FID."
        )
    return notes
