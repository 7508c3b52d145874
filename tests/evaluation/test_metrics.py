"""Distances against closed forms and SciPy; scores against formulas written long-hand; the
classifier of digits.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowturbo.data.latents import Latents, digits
from flowturbo.evaluation import metrics
from flowturbo.evaluation.digit_classifier import FEATURES, train_classifier
from flowturbo.evaluation.metrics import (
    Gaussian,
    frechet_distance,
    inception_score,
    precision_recall,
    rms_distance,
)
from flowturbo.evaluation.statistics import pareto_front

SEEDS = (0, 1, 2)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(seed: int, rows: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """(rows, D) features whose sample mean is `mean` and whose sample covariance is root' root,
    exactly.
    """
    white = normal(seed, rows, len(mean))
    white = white - white.mean(dim=0)
    white = torch.linalg.qr(white).Q * (rows - 1) ** 0.5
    return mean + white @ root


def scipy_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """As it is commonly computed: with the matrix square root of the product of the covariances."""
    mean, A, B = (
        a.mean(0) - b.mean(0),
        torch.atleast_2d(torch.cov(a.T)),
        torch.atleast_2d(torch.cov(b.T)),
    )
    root = scipy.linalg.sqrtm((A @ B).numpy())
    return float(mean @ mean + A.trace() + B.trace() - 2 * root.trace().real)


@pytest.mark.parametrize("seed", SEEDS)
def test_frechet_of_gaussians_with_one_set_of_axes(seed):
    """Then it is |difference of means|^2 + sum of squared differences of standard deviations."""
    D = 7
    axes = torch.linalg.qr(normal(seed, D, D)).Q
    deviations = 0.1 + normal(seed + 10, 2, D).abs()
    means = normal(seed + 20, 2, D)
    a, b = (
        with_moments(seed + 30 + i, 50 + 30 * i, means[i], deviations[i].diag() @ axes.T)
        for i in range(2)
    )
    expected = float(
        (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("D", [1, 5, 32])
@pytest.mark.parametrize("seed", SEEDS)
def test_frechet_agrees_with_scipy(D, seed):
    a = normal(seed, 200, D) @ normal(seed + 1, D, D)
    b = normal(seed + 2, 90, D) @ normal(seed + 3, D, D) + normal(seed + 4, D)
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a, b), rel=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_frechet_invariances(seed):
    a, b = 3 * normal(seed, 60, 6) + 1, normal(seed + 1, 41, 6) @ normal(seed + 2, 6, 6)
    distance = frechet_distance(a, b)
    rotation = torch.linalg.qr(normal(seed + 3, 6, 6)).Q
    shift = 5 * normal(seed + 4, 6)
    shuffled = a[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
    for what, value in {
        "symmetry": frechet_distance(b, a),
        "rotation": frechet_distance(a @ rotation, b @ rotation),
        "shift of both": frechet_distance(a + shift, b + shift),
        "order of rows": frechet_distance(shuffled, b),
        "scale, squared": frechet_distance(7 * a, 7 * b) / 49,
        "a feature that never changes": frechet_distance(
            torch.cat([a, a[:, :1] * 0 + 2], 1), torch.cat([b, b[:, :1] * 0 + 2], 1)
        ),
    }.items():
        assert value == pytest.approx(distance, rel=1e-12), what


@pytest.mark.parametrize("rows", [2, 5, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_frechet_with_singular_covariances(rows, seed):
    """Fewer rows than features, features that repeat each other: 0 from a set to itself, |shift|^2
    to its shifted self.
    """
    a = normal(seed, rows, 8)
    a = torch.cat([a, a, 1e-9 * normal(seed + 1, rows, 8)], dim=1)
    shift = normal(seed + 2, 24)
    total = float(a.var(dim=0).sum())
    assert 0 <= frechet_distance(a, a) <= 1e-13 * total
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-12)


def test_frechet_takes_float32_as_float64():
    a, b = normal(0, 50, 4).float() + 1000, normal(1, 50, 4).float() + 1000
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


GOOD = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "a, b, error, message",
    [
        ([[1.0], [2.0]], GOOD, TypeError, "features_a must be a tensor, got list"),
        (
            GOOD,
            GOOD[:, 0],
            ValueError,
            r"features_b must have shape \(N, D\) with N at least 2, got \(3,\)",
        ),
        (GOOD[:1], GOOD, ValueError, r"features_a .* got \(1, 2\)"),
        (GOOD, GOOD[:, :1], ValueError, "same width, got 2 and 1"),
        (GOOD, GOOD / 0, ValueError, "features_b must be finite"),
        (GOOD + float("inf"), GOOD, ValueError, "features_a must be finite"),
    ],
)
def test_frechet_refuses(a, b, error, message):
    with pytest.raises(error, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_rms_distance(seed):
    a = normal(seed, 3, 1, 4, 5)
    assert rms_distance(a, a) == 0
    assert rms_distance(a, a + 0.25) == pytest.approx(0.25, rel=1e-13)
    assert rms_distance(a, -a) == pytest.approx(2 * float(a.norm()) / 60**0.5, rel=1e-13)
    near = (1e4 * a).float()
    assert rms_distance(near, near.double() + 1e-6) == pytest.approx(
        1e-6, rel=1e-5
    )  # float32 would see no difference


@pytest.mark.parametrize(
    "a, b",
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(1, 3), torch.zeros(2, 3)),
        (GOOD[:0], GOOD[:0]),
    ],
)
def test_rms_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="one shape with at least one value"):
        rms_distance(a, b)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_pareto_front(points):
    """In a sweep by cost, a point is on the front when it is the best at its cost and better than
    all that is cheaper.
    """
    expected = []
    for cost, distance in points:
        cheaper = [d for c, d in points if c < cost]
        expected.append(
            distance == min(d for c, d in points if c == cost)
            and all(distance < d for d in cheaper)
        )
    assert pareto_front(points) == expected


def test_classifier_knows_held_out_digits():
    classifier = train_classifier(digits("train"))
    test = digits("test")
    assert classifier.accuracy(test) >= 0.97
    features, classes = classifier.read(test.mean)
    assert features.shape == (len(test), FEATURES)
    assert float((classes == test.labels).double().mean()) == classifier.accuracy(test)
    assert len(test) > 10 * FEATURES  # enough images for a covariance
    noise = normal(0, 400, 1, 8, 8).float()
    floor = frechet_distance(classifier.read(digits("train").mean)[0], features)
    assert frechet_distance(classifier.read(noise)[0], features) > 10 * floor
    assert not features.requires_grad
    assert torch.equal(
        classifier.read(3 * test.mean)[0], classifier.read((3 * test.mean).clamp(-1, 1))[0]
    )


def test_classifier_is_a_function_of_its_seed_alone():
    data = digits("train")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = train_classifier(data, steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    with torch.no_grad():  # as inside code that only samples
        b = train_classifier(data, steps=5)
    c = train_classifier(data, steps=5, seed=1)
    weights = [network.head.weight for network in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_classifier_refuses():
    other = Latents(torch.zeros(3, 4, 8, 8), torch.tensor([0, 1, 2]))
    with pytest.raises(
        ValueError, match=r"data must be latents \(1, 8, 8\) of 10 classes, got \(4, 8, 8\) of 3"
    ):
        train_classifier(other)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train_classifier(digits(), steps=0)


def gaussians(seed: int = 0, n: int = 300, d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, d, d, generator=generator)
    return tuple(torch.randn(n, d, generator=generator) @ m + k for k, m in enumerate(mix))


def test_gaussians_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 64)  # so that 300 rows are no multiple
    x = gaussians()[0] + 3000  # float32 sums of squares would lose the covariance
    gaussian = Gaussian.of(x)
    assert gaussian.mean.dtype == gaussian.covariance.dtype == torch.float64
    np.testing.assert_allclose(gaussian.mean, np.mean(x.double().numpy(), axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        gaussian.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_distance_of_gaussians_in_closed_form():
    """With common eigenvectors: |m|^2 + sum (sqrt a - sqrt b)^2, zero eigenvalues included."""
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    a, b = (
        torch.tensor([4.0, 1, 0.25, 9, 0, 2]).double(),
        torch.tensor([1.0, 1, 4, 0, 0, 1e-6]).double(),
    )
    m = torch.arange(6).double()
    one, other = (
        Gaussian(m, q @ a.diag() @ q.T),
        Gaussian(torch.zeros(6).double(), q @ b.diag() @ q.T),
    )
    expected = m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert one.distance(other) == pytest.approx(float(expected), rel=1e-10)
    assert other.distance(one) == pytest.approx(float(expected), rel=1e-10)
    assert one.distance(one) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("n", [300, 8], ids=["full rank", "singular"])
def test_distance_of_gaussians_is_that_of_their_features(n):
    a, b = gaussians(n=n)
    expected = frechet_distance(a, b)
    assert Gaussian.of(a).distance(Gaussian.of(b)) == pytest.approx(expected, rel=1e-8)
    assert expected == pytest.approx(scipy_frechet(a.double(), b.double()), rel=1e-5)


def test_gaussians_of_too_few_or_broken_features_are_refused():
    with pytest.raises(ValueError, match="N at least 2"):
        Gaussian.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="finite"):
        Gaussian.of(torch.tensor([[0.0], [float("nan")]]))


def score_by_hand(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1))))


def test_inception_score_by_hand():
    logits = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) * 3
    runs = [
        score_by_hand(logits[rows].double().numpy())
        for rows in (slice(0, 10), slice(10, 20), slice(20, 23))
    ]
    mean, deviation = inception_score(logits, split=10)
    assert mean == pytest.approx(np.mean(runs), rel=1e-12)
    assert deviation == pytest.approx(np.std(runs), rel=1e-9)
    assert inception_score(logits)[0] == pytest.approx(
        score_by_hand(logits.double().numpy()), rel=1e-12
    )
    assert inception_score(logits)[1] == 0


def test_inception_score_of_sure_and_of_unsure_classifiers():
    """As many classes as are seen, evenly and without doubt; 1 where nothing is told apart. No NaN
    where a class is impossible.
    """
    assert inception_score(5000 * torch.eye(7).repeat(3, 1))[0] == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.zeros(9, 4))[0] == pytest.approx(1, rel=1e-12)


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        count = 0
        for x in points:
            for i, centre in enumerate(manifold):
                others = sorted(
                    float(np.sum((centre - y) ** 2)) for j, y in enumerate(manifold) if j != i
                )
                if np.sum((x - centre) ** 2) <= others[k - 1]:
                    count += 1
                    break
        return count / len(points)

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(monkeypatch, rows, k):
    monkeypatch.setattr(metrics, "ROWS", rows)
    generator = torch.Generator().manual_seed(k)
    reference = torch.randn(40, 3, generator=generator)
    samples = 0.8 * torch.randn(29, 3, generator=generator) + 1.3
    expected = brute_force(reference.double().numpy(), samples.double().numpy(), k)
    assert precision_recall(reference, samples, k) == pytest.approx(expected, abs=1e-12)
    assert len({0.0, 1.0, *expected}) == 4  # neither trivial nor equal


def test_precision_and_recall_of_sets_that_are_equal_far_apart_or_a_part():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    two_modes = torch.cat([x, x + 100])
    assert precision_recall(two_modes, x) == (1, 0.5)
    assert precision_recall(x, two_modes) == (0.5, 1)


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(torch.randn(9, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="same width"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 3))


@pytest.fixture
def torch_fidelity(monkeypatch):
    """Its modules import torchvision, for other networks: a stand-in suffices for its functions of
    features.
    """
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    if find_spec("torchvision") is None:
        parts: dict[str, ModuleType] = {}
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            parts[name] = ModuleType(name)
            parts[name].__getattr__ = lambda attribute: type(attribute, (), {})
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(parts[parent], child, parts[name])
            monkeypatch.setitem(sys.modules, name, parts[name])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


def test_they_are_torch_fidelitys_figures(torch_fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = (x.double() for x in gaussians())
    b = 0.5 * (a[:150] + b[:150])
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), False
    )
    assert Gaussian.of(a).distance(Gaussian.of(b)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-9
    )
    theirs = isc_features_to_metric(a, splits=3, shuffle=False)
    assert inception_score(a, split=100) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9
    )
    theirs = prc_features_to_metric(
        b, a, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert precision_recall(a, b) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-6
    )
    assert 0 < theirs["precision"] < 1
    assert 0 < theirs["recall"] < 1
