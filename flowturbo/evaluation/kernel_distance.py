"""The kernel distance of KID: an unbiased squared MMD, so that small sets can be compared.

Fréchet distances fall with the number of pictures, and do so differently for different sets. This
one is right in the mean for any number (Bińkowski et al. 2018, arXiv 1801.01401).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .metrics import ROWS, features_of
from .statistics import BLOCKS


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """features (N, D), (M, D) -> the unbiased squared MMD, kernel (x . y / D + 1)^3, in float64.

    The mean of the kernel over pairs within a, plus that within b, less twice that between them; no
    row is paired with itself. It can be negative, by chance. ValueError for fewer than two rows,
    different widths, NaN or infinity.
    """
    return kernel_distances(features_a, features_b, 1)[0]


def kernel_distances(features: Tensor, reference: Tensor, blocks: int = BLOCKS) -> list[float]:
    """The kernel distance of each of `blocks` runs of rows to the whole reference.

    KID is their mean. The runs share no rows, so the standard error of the mean follows from them
    for a given reference. 10,000 pictures in ten runs are KID's published subsets of 1000.
    """
    a, b = features_of("features", features), features_of("reference", reference)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features and reference must have the same width, got {a.shape[1]} and {b.shape[1]}"
        )
    if len(a) < 2 * blocks:
        raise ValueError(
            f"features must have at least two rows in each of {blocks} blocks, got {len(a)}"
        )
    within = _within(b)
    return [
        _within(rows) + within - 2 * _sum(rows, b) / (len(rows) * len(b))
        for rows in a.tensor_split(blocks)
    ]


def _within(x: Tensor) -> float:
    """The mean of the kernel over pairs of different rows."""
    own = (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum()
    return (_sum(x, x) - float(own)) / (len(x) * (len(x) - 1))


def _sum(a: Tensor, b: Tensor) -> float:
    """The sum of the kernel over all pairs, ROWS rows at a time."""
    return sum(float((rows @ b.T / a.shape[1] + 1).pow(3).sum()) for rows in a.split(ROWS))


def leave_one_out(values: list[float]) -> list[float]:
    """The mean of the others, for each of the values.

    The jackknife's error of these is the standard error of the mean.
    """
    total = torch.tensor(values, dtype=torch.float64, device="cpu").sum()
    return [float(total - value) / (len(values) - 1) for value in values]
