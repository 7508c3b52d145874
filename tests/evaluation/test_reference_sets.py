"""Distances of samples to training and held-out pictures in the same class shares."""

import pytest
import scipy.linalg
import torch
from class_runs_small import class_double_loop

from flowturbo.evaluation.class_shares import proportional_labels
from flowturbo.evaluation.kernel_distance import Grouped, kernel_distances
from flowturbo.evaluation.metrics import frechet_distance, weighted_frechet
from flowturbo.evaluation.references import compared, quantiles
from flowturbo.evaluation.statistics import difference_error, value_error


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_weighted(a, p, b, q) -> float:
    """With the matrix square root of the product of the covariances."""
    mean = p @ a - q @ b
    A = torch.cov(a.T, aweights=p)
    B = torch.cov(b.T, aweights=q)
    root = scipy.linalg.sqrtm((A @ B).numpy())
    return float(mean @ mean + A.trace() + B.trace() - 2 * root.trace().real)


@pytest.mark.parametrize("seed", [0, 1])
def test_weighted_frechet_agrees_with_scipy(seed):
    a, b = normal(seed, 60, 5) @ normal(seed + 5, 5, 5), normal(seed + 1, 40, 5) + 0.5
    p, q = normal(seed + 2, 60).square(), normal(seed + 3, 40).square()
    p, q = p / p.sum(), q / q.sum()
    assert weighted_frechet(a, p, b, q) == pytest.approx(scipy_weighted(a, p, b, q), rel=1e-9)
    equal = [torch.full((n,), 1 / n, dtype=torch.float64) for n in (60, 40)]
    assert weighted_frechet(a, equal[0], b, equal[1]) == pytest.approx(
        frechet_distance(a, b), rel=1e-12
    )


def test_sets_are_compared_in_the_same_shares():
    """Against pictures weighted by hand; and with each block left out."""
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    c, d = torch.tensor([0, 0, 1] * 10), torch.tensor([1, 0, 1, 1] * 5)
    a, b = normal(0, 30, 3) + c[:, None], normal(1, 20, 3) + d[:, None]
    found = compared(Grouped(a, c, 2, 3), Grouped(b, d, 2, 1), shares)

    def expected(rows: torch.Tensor) -> float:
        n, m = (x.bincount(minlength=2) for x in (c[rows], d))
        return scipy_weighted(a[rows], (shares / n)[c[rows]], b, (shares / m)[d])

    assert found["frechet"] == pytest.approx(expected(torch.arange(30)), rel=1e-9)
    assert found["frechet_blocks"][1] == pytest.approx(
        expected(torch.cat([torch.arange(10), torch.arange(20, 30)])), rel=1e-9
    )
    assert found["kid"] == pytest.approx(class_double_loop(a, c, b, d, shares), rel=1e-12)
    assert found["classes"] == 2
    assert "kid_reference_blocks" not in found
    assert len(compared(Grouped(a, c, 2), Grouped(b, d, 2), shares)["kid_reference_blocks"]) == 10


def test_sets_without_a_common_class_are_not_compared():
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    a, b = Grouped(normal(0, 20, 3), torch.zeros(20).long(), 2), normal(1, 20, 3)
    assert compared(a, Grouped(b, torch.ones(20).long(), 2, 1), shares) == {}
    # Without its first block the second set has but one picture of the class.
    few = torch.tensor([0, 0, 0, *[1] * 16, 0])
    assert compared(a, Grouped(b, few, 2, 1), shares)
    assert compared(a, Grouped(b, few, 2, 4), shares) == {}


def test_standard_errors_are_the_spread_of_repeated_measurements():
    """Of two plans from the same noise, with other noise and other held-out pictures each time."""
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    labels, means = proportional_labels(shares, 150), 1.5 * normal(0, 3, 4)
    held_labels = proportional_labels(shares, 60)
    values, differences, errors = [], [], []
    for i in range(150):
        noise = normal(2 * i + 1, 150, 4)
        held = Grouped(normal(2 * i + 2, 60, 4) + means[held_labels], held_labels, 3)
        rows = []
        for x in (noise + 0.3, 1.1 * noise + 0.2):
            found = kernel_distances(Grouped(x + means[labels], labels, 3), held, shares)
            names = ("kid", "kid_blocks", "kid_reference_blocks")
            rows.append(dict(zip(names, found, strict=True)))
        values.append(rows[0]["kid"])
        differences.append(rows[0]["kid"] - rows[1]["kid"])
        alone = {key: rows[0][key] for key in ("kid", "kid_blocks")}
        both = value_error(rows[0], "kid"), difference_error(*rows, "kid")
        errors.append([*both, value_error(alone, "kid")])
    of_value, of_difference, of_samples = torch.tensor(errors).square().mean(dim=0).sqrt().tolist()
    spread, paired = (float(torch.tensor(x).std()) for x in (values, differences))
    assert 0.85 < of_value / spread < 1.25
    assert 0.85 < of_difference / paired < 1.25
    assert paired < 0.5 * spread
    assert of_samples < 0.75 * spread  # the held-out pictures are drawn, too


def test_quantiles():
    values = torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    assert quantiles(values) == {"0.01": 1.0, "0.05": 5.0, "0.5": 50.0}
