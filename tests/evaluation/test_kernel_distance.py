"""KID's kernel distance against a double loop and closed forms."""

import pytest
import torch
from class_runs_small import class_double_loop, double_loop

from flowturbo.evaluation import kernel_distance as module
from flowturbo.evaluation.kernel_distance import Grouped, kernel_distance, kernel_distances


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [(2, 2), (13, 7), (5, 30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_agrees_with_a_double_loop(monkeypatch, rows, seed):
    monkeypatch.setattr(module, "ROWS", 4)
    a, b = normal(seed, rows[0], 6) + 0.3, 1.5 * normal(seed + 9, rows[1], 6)
    assert kernel_distance(a, b) == pytest.approx(double_loop(a, b), rel=1e-12)
    assert kernel_distance(a.float(), b) == pytest.approx(double_loop(a.float(), b), rel=1e-12)


def test_points():
    """All of a at one point and all of b at another: the kernel between them, by hand."""
    a, b = torch.tensor([[1.0, 2.0]]).repeat(3, 1), torch.tensor([[0.0, -2.0]]).repeat(4, 1)
    assert kernel_distance(a, b) == pytest.approx(3.5**3 + 3.0**3 - 2 * (-1.0) ** 3, rel=1e-14)
    assert kernel_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_it_is_right_in_the_mean_for_small_sets():
    """0 for two sets of one distribution, however small, unlike the Fréchet distance."""
    values = torch.tensor(
        [kernel_distance(normal(i, 5, 3), normal(i + 10_000, 8, 3)) for i in range(300)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / 300**0.5
    assert float((values < 0).double().mean()) > 0.2


SHARES = torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64)


def labels_of(seed: int, rows: int) -> torch.Tensor:
    return torch.randint(4, (rows,), generator=torch.Generator().manual_seed(seed))


def test_mixtures_agree_with_a_double_loop(monkeypatch):
    """And so do those with a block left out."""
    monkeypatch.setattr(module, "ROWS", 5)
    (a, b), (c, d) = (
        (normal(0, 43, 5), normal(1, 31, 5) + 0.2),
        (labels_of(2, 43), labels_of(3, 31)),
    )
    found = kernel_distances(Grouped(a, c, 4, 3), Grouped(b, d, 4, 2), SHARES)
    assert found.value == pytest.approx(class_double_loop(a, c, b, d, SHARES), rel=1e-12)
    for i, rows in enumerate(torch.arange(43).tensor_split(3)):
        kept = torch.ones(43, dtype=torch.bool).index_fill(0, rows, False)
        expected = class_double_loop(a[kept], c[kept], b, d, SHARES)
        assert found.blocks[i] == pytest.approx(expected, rel=1e-12)
    expected = class_double_loop(a, c, b[16:], d[16:], SHARES)
    assert found.reference_blocks[0] == pytest.approx(expected, rel=1e-12)
    assert len(found.reference_blocks) == 2


def test_a_class_with_one_picture_is_left_out():
    a, b, c = normal(0, 10, 3), normal(1, 10, 3), torch.tensor([0, 1] * 5)
    d = torch.tensor([0] * 9 + [1])
    shares = torch.tensor([0.4, 0.6], dtype=torch.float64)
    found = kernel_distances(Grouped(a, c, 2, 1), Grouped(b, d, 2, 1), shares)
    assert found.value == pytest.approx(double_loop(a[::2], b[:9]), rel=1e-12)


def test_mixtures_of_one_distribution_are_at_no_distance_in_the_mean():
    """Whatever the classes' shares are in the two sets; without weights they would be apart."""
    means = 2 * normal(0, 4, 3)
    c, d = torch.tensor([0] * 6 + [1] * 3 + [2] * 2), torch.tensor([0] * 2 + [1] * 5 + [2] * 5)
    values, plain = [], []
    for i in range(200):
        a, b = normal(i + 1, 11, 3) + means[c], normal(i + 10_000, 12, 3) + means[d]
        values.append(kernel_distances(Grouped(a, c, 4, 1), Grouped(b, d, 4, 1), SHARES).value)
        plain.append(kernel_distance(a, b))
    mean, error = float(torch.tensor(values).mean()), float(torch.tensor(values).std()) / 200**0.5
    assert abs(mean) < 4 * error
    assert float(torch.tensor(plain).mean()) > 10 * error


@pytest.mark.parametrize(
    "a, b, message",
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), "the same width, got 2 and 4"),
        (torch.zeros(3, 2), torch.zeros(1, 2), "features_b must have shape"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), "features_a must be finite"),
    ],
)
def test_bad_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(a, b)
