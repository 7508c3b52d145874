"""The one rule by which tests compare numbers: relative error in the 2-norm, against a stated
bound.
"""

from __future__ import annotations

import fake_cuda
import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64; infinite where either holds NaN or infinity.
    AssertionError for other shapes.
    """
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not (a.isfinite().all() and e.isfinite().all()):
        return float("inf")
    scale = float(e.norm())
    difference = float((a - e).norm())
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def assert_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Fail, with the error and the worst place, unless the relative error is at most `bound`.

    On the stand-in for a CUDA device no value means anything: there the shape alone is compared.
    """
    if fake_cuda.PRESENT:
        assert actual.shape == expected.shape, (
            f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
        return
    error = relative_error(actual, expected)
    if not error <= bound:
        gap = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
        worst = torch.unravel_index(gap.nan_to_num(nan=float("inf")).argmax(), gap.shape)
        place = tuple(int(i) for i in worst)
        raise AssertionError(
            f"relative error {error:.3g} is above {bound:.3g}; worst at {place}: "
            f"{float(actual[place]):.8g}, expected {float(expected[place]):.8g}"
        )


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Fail unless they are equal to the last bit, in shape, dtype and device. On the stand-in: in
    these three alone.
    """
    for what in ("shape", "dtype", "device"):
        got, wanted = getattr(actual, what), getattr(expected, what)
        assert got == wanted, f"{what} {got}, expected {wanted}"
    if not fake_cuda.PRESENT and not torch.equal(actual, expected):
        assert_close(actual, expected, 0.0)
        raise AssertionError("not equal to the last bit: both hold NaN, or zeros of other signs")
