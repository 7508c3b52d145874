"""The kernel distance of KID: an unbiased squared MMD, so that small sets can be compared.

A Fréchet distance falls with the number of pictures, this one is right in the mean for any number
(Bińkowski et al. 2018, arXiv 1801.01401).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .class_shares import common_shares
from .metrics import ROWS, features_of
from .statistics import BLOCKS


class Grouped:
    """Features by block and class.

    features (N, D); labels (N,), below `num_classes`. Blocks are runs of rows, for the jackknife.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, blocks: int = BLOCKS
    ) -> None:
        self.features, self.labels = features_of("features", features), labels
        self.shape = blocks, num_classes
        lengths = [len(part) for part in labels.tensor_split(blocks)]
        numbers = torch.arange(blocks, device="cpu")
        self.block = numbers.repeat_interleave(torch.tensor(lengths, device="cpu"))
        self.group = self.block * num_classes + labels
        self.counts = self._by_group(torch.ones_like(labels, dtype=torch.float64))
        self.own = self._by_group(_kernel(self.features.square().sum(dim=1), self.width))
        """The sum of the kernel of each row with itself."""

    @property
    def width(self) -> int:
        return self.features.shape[1]

    def _by_group(self, values: Tensor) -> Tensor:
        sums = torch.zeros(self.shape, dtype=torch.float64, device="cpu").flatten()
        return sums.index_add(0, self.group, values).view(self.shape)

    def sums(self, other: Grouped) -> Tensor:
        """The kernel summed over all pairs of two groups, (blocks, K, blocks of other, K)."""
        (b, k), (c, _) = self.shape, other.shape
        total = torch.zeros(b * k, c * k, dtype=torch.float64, device="cpu")
        for rows, groups in zip(self.features.split(ROWS), self.group.split(ROWS), strict=True):
            values = _kernel(rows @ other.features.T, self.width)
            columns = torch.zeros(len(rows), c * k, dtype=torch.float64, device="cpu")
            total.index_add_(0, groups, columns.index_add_(1, other.group, values))
        return total.view(b, k, c, k)

    @functools.cached_property
    def within(self) -> Tensor:
        """`sums` with itself."""
        return self.sums(self)

    def without(self) -> list[Tensor]:
        """Which blocks are kept, (blocks,), float64: all, then all but the first, ...

        Of a single block only that.
        """
        every = torch.ones(self.shape[0], dtype=torch.float64, device="cpu")
        if len(every) == 1:
            return [every]
        left_out = 1 - torch.eye(self.shape[0], dtype=torch.float64, device="cpu")
        return [every, *left_out]


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1).pow(3)


class Distances(NamedTuple):
    """A distance, and its values with each block of either set left out.

    A set of a single block has none of these.
    """

    value: float
    blocks: list[float]
    reference_blocks: list[float]


def kernel_distances(a: Grouped, b: Grouped, shares: Tensor) -> Distances:
    """The squared MMD of two mixtures of the same classes in the same shares, without bias.

    Kernel (x . y / D + 1)^3, as KID's; its mean is taken over all pairs of two classes, of one set
    without pairs of a row with itself, and classes are weighted by `shares`, (K,), whatever
    the sets' own shares are. Classes of which either set has fewer than two rows are left out.
    With one class it is the published estimator, over all pairs. It can be below 0, by chance; of
    no class it is 0.
    """
    between = a.sums(b)
    kept_a, kept_b = a.without(), b.without()

    def estimate(keep_a: Tensor, keep_b: Tensor) -> float:
        n, m = keep_a @ a.counts, keep_b @ b.counts
        p = common_shares(shares, n, m)
        pairs = "i,j,ikjl->kl"
        mean = _mean_within(torch.einsum(pairs, keep_a, keep_a, a.within), keep_a @ a.own, n)
        mean = mean + _mean_within(torch.einsum(pairs, keep_b, keep_b, b.within), keep_b @ b.own, m)
        cross = torch.einsum(pairs, keep_a, keep_b, between) / (n[:, None] * m).clamp(min=1)
        return float(p @ (mean - 2 * cross) @ p)

    return Distances(
        estimate(kept_a[0], kept_b[0]),
        [estimate(keep, kept_b[0]) for keep in kept_a[1:]],
        [estimate(kept_a[0], keep) for keep in kept_b[1:]],
    )


def _mean_within(sums: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """(K, K), the mean over pairs of different rows of two classes."""
    pairs = counts[:, None] * counts - counts.diag()
    return (sums - own.diag()) / pairs.clamp(min=1)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """features (N, D), (M, D) -> the unbiased squared MMD, kernel (x . y / D + 1)^3, in float64.

    The mean of the kernel over pairs within a, plus that within b, less twice that between them; no
    row is paired with itself. ValueError for fewer than two rows, different widths, NaN or
    infinity.
    """
    a, b = features_of("features_a", features_a), features_of("features_b", features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features_a and features_b must have the same width, got {a.shape[1]} and {b.shape[1]}"
        )
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    sides = [Grouped(x, torch.zeros(len(x), dtype=torch.int64, device="cpu"), 1, 1) for x in (a, b)]
    return kernel_distances(sides[0], sides[1], one).value
