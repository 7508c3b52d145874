"""The change of stage on data whose velocity is known exactly.

The data are Gaussian, independent in the cosines of the image. So the exact solution multiplies
each coefficient of the noise by a number, and every coefficient can be held to it, image by image.
"""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from scipy.fft import dctn, idctn
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.rng import later_noise
from flowturbo.sampling import enlarge as enlarging
from flowturbo.sampling.enlarge import bicubic, coarse_noise, kept_noise, with_low_frequencies
from flowturbo.solver import stages

SIDE, HALF = 12, 6


def dct(x: Tensor) -> Tensor:
    return torch.from_numpy(dctn(x.numpy(), axes=(-2, -1), norm="ortho"))


def inverse_dct(c: Tensor) -> Tensor:
    return torch.from_numpy(idctn(c.numpy(), axes=(-2, -1), norm="ortho"))


def spectrum(side: int) -> Tensor:
    """The variance of each coefficient of the same pictures at a size."""
    frequency = torch.arange(side, dtype=torch.float64)
    square = frequency[:, None] ** 2 + frequency**2
    return 40 / (1 + square) ** 1.5 * (side / SIDE) ** 2


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[data - noise | x] of this data."""
    variance = spectrum(x.shape[-1])
    gain = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
    return inverse_dct(gain * dct(x))


def exact_enlarging(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The same picture at another size: its coefficients grow with the side."""
    ratio = size[0] / x.shape[-1]
    padded = x.new_zeros(*x.shape[:2], *size)
    padded[..., : x.shape[-2], : x.shape[-1]] = ratio * dct(x)
    return inverse_dct(padded)


def solved(plan: str, noise: Tensor, enlarge: object = ("latents", exact_enlarging)) -> Tensor:
    """The coefficients of the images, in units of what their standard deviation should be."""
    return dct(ft.sample(velocity, plan, noise=noise, enlarge=enlarge)) / spectrum(SIDE).sqrt()


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(5, 2, SIDE, SIDE, dtype=torch.float64)


@pytest.mark.parametrize("level", [0.8, 0.5])
def test_matched_stages_solve_the_low_frequencies_exactly(noise, level):
    """As the plan at full size does; and the high ones as well as any start without their signal,
    which at noise level s lacks a part t * t * S / ((1 - t) ** 2 + t * t * S) of their variance.
    """
    found = solved(f"C30 at 1/2 + C30 from {level}", noise)
    low, own = found[..., :HALF, :HALF], dct(noise)
    assert_close(low, own[..., :HALF, :HALF], 2e-3)
    assert_close(solved("C60", noise), own, 2e-3)
    lacking = ((1 - level) ** 2 * spectrum(SIDE) / level**2 + 1).rsqrt() * own
    low[:] = lacking[..., :HALF, :HALF] = 0
    assert_close(found, lacking, 2e-3)


def test_three_stages_of_odd_ratios(noise):
    found = solved("C30 at 1/3 + C30 at 3/4 from 0.9 + C30 from 0.7", noise)
    third = SIDE // 3
    assert_close(found[..., :third, :third], dct(noise)[..., :third, :third], 3e-3)


@pytest.mark.parametrize("end, level", [(0.0, 0.4), (0.2, 0.6)])
def test_new_noise_gives_the_right_variance_at_every_low_frequency(noise, end, level):
    """The first noise and the new one take part with squares that sum up to 1.

    The smaller image goes back from t to s, the time that matches the next stage's start: scaled by
    s / t, with as much noise as the path has at s, and is then solved on at full size.
    """
    found = solved(f"C80 at 1/2 to {end} + C80 from {level}", noise)[..., :HALF, :HALF]
    t, s, variance = 1 - end, 2 * (1 - level) / (level + 2 * (1 - level)), spectrum(HALF)
    deviation = (s**2 * variance + (1 - s) ** 2).sqrt()  # of the path at s
    share = s / t * (t**2 * variance + (1 - t) ** 2).sqrt() / deviation
    new = ((1 - s) ** 2 - (s / t * (1 - t)) ** 2) ** 0.5 / deviation
    assert_close(share**2 + new**2, torch.ones(HALF, HALF, dtype=torch.float64), 1e-12)
    drawn = later_noise(noise, (2, HALF, HALF), 1).double()
    assert_close(found, share * dct(noise)[..., :HALF, :HALF] + new * dct(drawn), 2e-3)


def same_level(level: float, ratio: float) -> float:
    return level


def no_noise(noise: Tensor, low: Tensor) -> Tensor:
    return noise


@pytest.mark.parametrize(
    "where, name, wrong",
    [
        (stages, "matched_level", same_level),  # the times are not matched
        (enlarging, "kept_noise", lambda *levels: 0.0),  # all of the noise is new
        (enlarging, "with_low_frequencies", no_noise),  # that of the last stage is dropped
    ],
)
def test_without_the_matching_the_law_is_broken(monkeypatch, where, name, wrong):
    noise = torch.randn(400, 1, SIDE, SIDE, dtype=torch.float64)

    def off() -> float:
        """The variance of each low coefficient, relative to what this noise should give."""
        found, own = solved("C30 at 1/2 + C30 from 0.6", noise), dct(noise)
        found, own = (c[..., :HALF, :HALF].square().mean(dim=(0, 1)) for c in (found, own))
        return float((found / own - 1).abs().max())

    assert off() < 0.01
    monkeypatch.setattr(where, name, wrong)
    if name == "matched_level":  # all noise is kept, as if the levels matched
        monkeypatch.setattr(enlarging, "kept_noise", lambda *levels: 1.0)
    assert off() > 0.1


def test_cubic_interpolation_keeps_the_lowest_frequencies(noise):
    found = solved("C30 at 1/2 + C30 from 0.6", noise, "latents")[..., :2, :2]
    own = dct(noise)[..., :2, :2]
    assert_close(found, own, 0.05)


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (8, 9), (8, 4)])
def test_low_frequencies_of_noise_are_noise(size):
    """By scipy's transform: the small noise holds the low coefficients, to the last digits."""
    noise, low = torch.randn(2, 3, 8, 9).double(), torch.randn(2, 3, *size).double()
    rows, columns = size
    coarse, mixed = coarse_noise(noise, size), with_low_frequencies(noise, low)
    assert_close(dct(coarse), dct(noise)[..., :rows, :columns], 1e-13)
    expected = dct(noise)
    expected[..., :rows, :columns] = dct(low)
    assert_close(dct(mixed), expected, 1e-13)
    assert_close(coarse_noise(mixed, size), low, 1e-13)


def test_at_the_same_size_nothing_is_computed():
    noise, low = torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9)
    assert coarse_noise(noise, (8, 9)) is noise
    assert with_low_frequencies(noise, low) is low
    assert bicubic(noise, (8, 9)) is noise


@pytest.mark.parametrize("end, start, ratio", [(0.3, 0.7, 2.0), (0.05, 0.9, 4.0), (0.2, 0.4, 1.0)])
def test_the_share_of_noise_that_is_kept(end, start, ratio):
    """What is added brings the smaller image from one point of its path to an earlier one: scaled
    by s / t, its noise has the variance that the path has at s with this share in it.
    """
    s, t = 1 - stages.matched_level(start, ratio), 1 - end
    added = (1 - s) ** 2 - (s / t * (1 - t)) ** 2
    kept = kept_noise(end, start, ratio)
    assert (1 - kept**2) * (1 - s) ** 2 == pytest.approx(added)
    assert kept_noise(stages.matched_level(start, ratio), start, ratio) == 1
    assert kept_noise(0.0, start, ratio) == 0


def test_later_noise_is_of_its_row_alone():
    noise = torch.randn(4, 2, 3)
    whole = later_noise(noise, (25, 40), 1)
    assert whole.shape == (4, 25, 40)
    assert later_noise(noise[[2, 0]], (25, 40), 1).equal(whole[[2, 0]])
    assert later_noise(noise.double(), (25, 40), 1).equal(whole)
    others = [later_noise(noise, (25, 40), 2), later_noise(noise + 1e-6, (25, 40), 1)]
    drawn = torch.stack([whole, *others, later_noise(noise.flip(0), (25, 40), 1)[[0, 3, 1, 2]]])
    assert (drawn.flatten(1).corrcoef() - torch.eye(4)).abs().max() < 0.3
    large = later_noise(torch.randn(2, 1), (40000,), 0)
    assert_close(large.std(dim=1), torch.ones(2), 0.02)
