"""The nearest training picture, against brute force; class shares."""

import pytest
import torch
from class_runs_small import drawn

from flowturbo.data.latents import Latents
from flowturbo.evaluation.class_shares import (
    common_shares,
    proportional_labels,
    share_weights,
    shares_of,
)
from flowturbo.evaluation.nearest import Nearest


@pytest.mark.parametrize("flipped", [True, False])
def test_it_agrees_with_brute_force(flipped):
    data = drawn(0, (7, 6, 5), flipped)
    x = 1.3 * torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    every = torch.cat([data.mean, data.mean.flip(3)]).double()
    expected = [
        min(float((picture.double().clamp(-1, 1) - one).square().mean().sqrt()) for one in every)
        for picture in x
    ]
    found = Nearest(data)(x)
    assert found.dtype == torch.float64
    # Found in float32: of two that differ by 1e-6 either may be taken.
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_memorised_picture_is_at_no_distance():
    data = drawn(0, (3, 3, 3))
    assert Nearest(data)(data.mean).tolist() == [0.0] * 9
    assert Nearest(data)(data.mean.flip(3)).tolist() == [0.0] * 9
    near = Nearest(data)(data.mean + 0.01)
    assert near.tolist() == pytest.approx([0.01] * 9, rel=1e-4)


def test_mirrored_pictures_of_the_data_are_taken():
    """Which need not be the exact mirror images, as of an encoder."""
    data = drawn(0, (3, 3, 3))
    other = Latents(data.mean, data.labels, latents_flipped=data.mean.flip(3) + 0.1)
    assert float(Nearest(other)(data.mean.flip(3) + 0.1).max()) == 0


def test_any_first_labels_have_the_shares_of_the_data():
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((50, 31, 0, 7, 1))])
    shares = shares_of(labels, 6)
    chosen = proportional_labels(shares, 400)
    for n in (1, 2, 17, 89, 178, 400):
        counts = chosen[:n].bincount(minlength=6)
        assert float((counts - n * shares).abs().max()) <= 1, n
    assert chosen[:89].bincount(minlength=6).tolist() == [50, 31, 0, 7, 1, 0]
    assert chosen[:100].tolist() == proportional_labels(shares, 100).tolist()


def test_weights_bring_a_set_to_the_shares():
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 1, 0])
    shares = common_shares(
        torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64), labels.bincount(minlength=4)
    )
    assert shares.tolist() == pytest.approx([0.625, 0.375, 0, 0])  # of class 2 there is one picture
    weights = share_weights(labels, shares)
    sums = [float(weights[labels == c].sum()) for c in range(3)]
    assert sums == pytest.approx([0.625, 0.375, 0], rel=1e-14)
    assert weights[0] == weights[3]
    two = common_shares(
        torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([5, 2]), torch.tensor([1, 2])
    )
    assert two.tolist() == [0, 1]
    none = common_shares(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1, 5]))
    assert none.tolist() == [0, 0]
