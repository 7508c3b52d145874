"""Class shares: labels for samples, and weights by which two sets have the same ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def shares_of(labels: Tensor, num_classes: int) -> Tensor:
    """The share of each class, (num_classes,), float64."""
    return labels.bincount(minlength=num_classes).double() / len(labels)


def proportional_labels(shares: Tensor, count: int) -> Tensor:
    """Labels (count,), int64, of which any first n have these shares, up to one picture.

    Each is of the class that is the farthest behind its share. So more images leave the labels of
    the first ones as they are.
    """
    behind, chosen = np.zeros(len(shares)), np.empty(count, dtype=np.int64)
    for i in range(count):
        behind += shares.numpy()
        chosen[i] = behind.argmax()
        behind[chosen[i]] -= 1
    return torch.from_numpy(chosen)


def common_shares(shares: Tensor, *counts: Tensor) -> Tensor:
    """The shares of the classes of which every set has at least two pictures, 0 for the others.

    counts: of each set's pictures by class, (num_classes,). The sum is 1, or 0 if no class is left.
    Two are needed, since pairs of different pictures of a class are.
    """
    there = torch.stack([count >= 2 for count in counts]).all(dim=0)
    kept = torch.where(there, shares, 0)
    return kept / kept.sum() if there.any() and kept.sum() > 0 else torch.zeros_like(shares)


def share_weights(labels: Tensor, shares: Tensor) -> Tensor:
    """A weight for each picture, (N,), float64, by which the classes have these shares."""
    counts = labels.bincount(minlength=len(shares)).double()
    return (shares / counts.clamp(min=1))[labels]
