"""Class proportions: labels for samples, and samples chosen so that two sets have the same ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def proportional_labels(labels: Tensor, num_classes: int, count: int) -> Tensor:
    """Labels (count,), int64, of which any first n have the classes' shares in `labels`, up to one.

    Each is of the class that is the farthest behind its share. So more images leave the labels of
    the first ones as they are.
    """
    shares = labels.bincount(minlength=num_classes).double().numpy() / len(labels)
    behind, chosen = np.zeros(num_classes), np.empty(count, dtype=np.int64)
    for i in range(count):
        behind += shares
        chosen[i] = behind.argmax()
        behind[chosen[i]] -= 1
    return torch.from_numpy(chosen)


def matched(labels: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows of `labels` as can be had in the class proportions of `reference`.

    labels (N,), reference (M,) -> rows of labels, the first of each class, in order; and rows of
    the reference, all but those of classes of which `labels` has too few.
    """
    classes = int(max(labels.max(), reference.max())) + 1
    have, want = labels.bincount(minlength=classes), reference.bincount(minlength=classes)
    want = torch.where(have > 0, want, 0)
    there = want > 0
    if not there.any():
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        return nothing, nothing
    # Whole numbers: a product with a ratio in floating point may fall just below one.
    scarce = int((have[there].double() / want[there].double()).argmin())
    most, per = int(have[there][scarce]), int(want[there][scarce])
    take = want * most // per
    rows = [(labels == c).nonzero()[: int(n), 0] for c, n in enumerate(take) if n]
    return torch.cat(rows).sort().values, (take[reference] > 0).nonzero()[:, 0]
