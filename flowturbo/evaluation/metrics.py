"""Metrics of image quality: Fréchet and RMS distances, inception score, precision and recall."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import positive


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """features (N, D), (M, D) -> the squared Fréchet distance of their Gaussians, in float64.

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, with A, B the unbiased
    covariances: FID is this value for Inception's features. ValueError for fewer than two rows,
    different widths, NaN or infinity.
    """
    a, b = _pair("features_a", features_a, "features_b", features_b)
    return _frechet(*_mean_and_root(a), *_mean_and_root(b))


def weighted_frechet(a: Tensor, weights_a: Tensor, b: Tensor, weights_b: Tensor) -> float:
    """The squared Fréchet distance of features (N, D), (M, D) with weights (N,), (M,), in float64.

    The weights of each set have the sum 1. With equal ones it is `frechet_distance`.
    """
    return _frechet(*_weighted_mean_and_root(a, weights_a), *_weighted_mean_and_root(b, weights_b))


def _weighted_mean_and_root(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `_mean_and_root`; the covariance is unbiased for weights that do not depend on the rows'
    features.
    """
    mean = weights @ features
    root = torch.linalg.qr(weights.sqrt()[:, None] * (features - mean), mode="r").R
    return mean, root / (1 - weights.square().sum()).sqrt()


def _frechet(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    # With A = Ra' Ra and B = Rb' Rb the last trace is the sum of the singular values of Ra Rb'.
    # This avoids square roots of small eigenvalues, which would turn a rounding error of 1e-16 into
    # 1e-8, so that singular covariances need no special case.
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    squared = (
        (mean_a - mean_b).square().sum()
        + root_a.square().sum()
        + root_b.square().sum()
        - 2 * overlap
    )
    return max(0.0, float(squared))


def _pair(
    name_a: str, features_a: Tensor, name_b: str, features_b: Tensor
) -> tuple[Tensor, Tensor]:
    a, b = features_of(name_a, features_a), features_of(name_b, features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name_a} and {name_b} must have the same width, got {a.shape[1]} and {b.shape[1]}"
        )
    return a, b


def features_of(name: str, features: Tensor) -> Tensor:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(features).__name__}")
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise ValueError(
            f"{name} must have shape (N, D) with N at least 2, got {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    return features.detach().to("cpu", torch.float64)


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> mean (D,) and a matrix R (min(N, D), D) with R' R the unbiased covariance."""
    mean = features.mean(dim=0)
    root = torch.linalg.qr(features - mean, mode="r").R
    return mean, root / (len(features) - 1) ** 0.5


ROWS = 1000
"""Rows per chunk where sets of many thousand images are compared or summed in float64."""


class Gaussian(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """features (N, D), any float dtype, summed in float64; ValueError as frechet_distance."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"features must have shape (N, D) with N at least 2, got {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinity in them")
        mean = features.mean(dim=0, dtype=torch.float64)
        scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for rows in features.split(ROWS):
            centred = rows.double() - mean
            scatter.addmm_(centred.T, centred)
        return cls(mean, scatter / (len(features) - 1))

    def distance(self, other: Gaussian) -> float:
        """The squared Fréchet distance, as in FID."""
        return _frechet(self.mean, _root(self.covariance), other.mean, _root(other.covariance))


def _root(covariance: Tensor) -> Tensor:
    """R with R' R the covariance.

    Eigenvalues within rounding of zero are set to zero, since the root would enlarge their error.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = torch.where(
        values > len(values) * torch.finfo(values.dtype).eps * values[-1], values, 0
    )
    return values.sqrt()[:, None] * vectors.T


def inception_score(logits: Tensor, split: int = 5000) -> tuple[float, float]:
    """logits (N, classes) -> the inception score: mean and standard deviation over splits.

    The score of a split is exp(mean KL(p(y|x) || p(y))), in float64. Splits are as in ADM's
    evaluator: runs of `split` images in order, the last one shorter if N is not a multiple.
    """
    scores = []
    for rows in logits.split(positive("split", split)):
        log_p = rows.double().log_softmax(dim=1)
        log_q = log_p.logsumexp(dim=0) - math.log(len(rows))
        # Where p is 0, log_softmax is finite, so p log p is 0 and not NaN.
        scores.append(float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean().exp()))
    return statistics.fmean(scores), statistics.pstdev(scores)


@torch.no_grad()
def precision_recall(
    reference: Tensor, samples: Tensor, neighbours: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """features (N, D), (M, D) -> improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of samples within the reference's manifold, recall the share of the
    reference within that of the samples. A set's manifold is the union of balls around its
    features, each with the distance to its `neighbours`-th nearest other feature as radius.
    Distances are computed in float64 on `device`, ROWS rows at a time. ValueError unless both sets
    have more than `neighbours` rows.
    """
    a, b = (x.to(device) for x in _pair("reference", reference, "samples", samples))
    if min(len(a), len(b)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} images on each side, got {len(a)} "
            f"and {len(b)}"
        )
    radii_a, radii_b = _squared_radii(a, neighbours), _squared_radii(b, neighbours)
    samples_inside = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    reference_inside = []
    for rows, radii in zip(a.split(ROWS), radii_a.split(ROWS), strict=True):
        distances = _squared_distances(rows, b)
        samples_inside |= (distances <= radii[:, None]).any(dim=0)
        reference_inside.append((distances <= radii_b).any(dim=1))
    return float(samples_inside.double().mean()), float(torch.cat(reference_inside).double().mean())


def _squared_radii(x: Tensor, neighbours: int) -> Tensor:
    """(N, D) -> (N,), the squared distance of each row to its `neighbours`-th nearest other row."""
    return torch.cat(
        [
            _squared_distances(rows, x).kthvalue(neighbours + 1, dim=1).values
            for rows in x.split(ROWS)
        ]
    )


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(dim=1)[:, None] - 2 * a @ b.T + b.square().sum(dim=1)).clamp(min=0)


def rms_distance(a: Tensor, b: Tensor) -> float:
    """The root mean square of a - b over all values, in float64.

    ValueError for tensors of different shapes, and for empty ones.
    """
    if a.shape != b.shape or not a.numel():
        raise ValueError(
            f"a and b must have one shape with at least one value, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    return float((a.double() - b.to(a.device).double()).square().mean().sqrt())
