"""Callables as models: their convention, the order and shape of their arguments, their results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from close import assert_close
from tiny import tiny_model
from torch import Tensor, nn

import flowturbo as ft

PLANS = ["E5", "A5", "B6", "H3E1", "H1P4", "H1P3A2"]


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """data - noise at the time t: curved, and no function of x or t alone."""
    return torch.sin(3 * x) * (1 + t) - x * t**2


def sigma_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """noise - data of the same field, at a noise level."""
    return -(torch.sin(3 * x) * (2 - sigma) - x * (1 - sigma) ** 2)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(5, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("plan", PLANS)
def test_both_conventions_are_one_field(plan, noise):
    seen: list[Any] = []
    by_sigma = ft.sample(
        sigma_velocity, plan, noise=noise, convention="sigma", callback=seen.append
    )
    expected: list[Any] = []
    by_time = ft.sample(velocity, plan, noise=noise, callback=expected.append)
    assert_close(by_sigma, by_time, 1e-14)
    for one, other in zip(seen, expected, strict=True):
        assert_close(one.denoised, other.denoised, 1e-13)


@pytest.mark.parametrize("convention", ["time", "sigma"])
def test_a_callable_is_called_with_its_convention(convention, noise):
    levels = []

    def model(x: Tensor, level: Tensor, *, scale: float) -> Tensor:
        levels.append(float(level))
        return torch.full_like(x, scale)

    x = ft.sample(model, "H1E1", noise=noise, convention=convention, scale=2.0)
    assert levels == ([0.0, 0.5, 0.5] if convention == "time" else [1.0, 0.5, 0.5])
    assert_close(x, noise + (2.0 if convention == "time" else -2.0), 1e-15)


class Static:
    """Returns the same `count` buffers in turn, as callables that replay CUDA graphs do."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.buffers, self.calls = [torch.empty_like(like) for _ in range(count)], 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        buffer = self.buffers[self.calls % len(self.buffers)]
        self.calls += 1
        return buffer.copy_(velocity(x, t)).view(x.shape)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_a_callable_may_return_its_buffer_again(plan, count, noise):
    previews: list[Any] = []
    x = ft.sample(Static(noise, count), plan, noise=noise, callback=previews.append)
    expected: list[Any] = []
    assert x.equal(ft.sample(velocity, plan, noise=noise, callback=expected.append))
    for one, other in zip(previews, expected, strict=True):
        assert one.denoised.equal(other.denoised)


# Arguments


class Wrapper(nn.Module):
    """The order of torchcfm and torchdiffeq."""

    def forward(self, t: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        times = t.repeat(x.shape[0])[:, None]
        return torch.cat([x, times], 1)[:, : x.shape[1]]


def needs_rows(a: Tensor, b: Tensor) -> Tensor:
    return a * b[:, None]


TURNED = r"model takes its arguments as \(t, x\), but .* pass lambda x, t, \*\*cond: model\(t, x"
ROWS = r"model needs t of shape \(N,\).* pass lambda x, t, \*\*cond: model\(x, t.expand\(len\(x\)\)"


@pytest.mark.parametrize(
    "model, said",
    [
        (Wrapper(), TURNED),
        (functools.partial(lambda t, x, k: k * x, k=2), TURNED),
        (lambda time, sample: time * sample, TURNED),
        (lambda t, y: -y, TURNED),
        # Their names tell nothing:
        (lambda a, b: Wrapper()(a, b), TURNED),
        (lambda *both: -both[1], TURNED),
        (needs_rows, ROWS),
        (lambda x, t: nn.functional.linear(t[:, None], torch.ones(2, 1)) * x, ROWS),
        (lambda a, b: needs_rows(b, a), r"as \(t, x\), with t of shape \(N,\)"),
    ],
)
def test_other_orders_and_a_batch_of_t_are_named(model, said):
    with pytest.raises(TypeError, match=said):
        ft.sample(model, "H1P5", noise=torch.randn(8, 2))


def test_what_the_errors_say_to_do_works():
    noise = torch.randn(8, 2)
    wrapper, said = Wrapper(), torch.randn(8, 2)
    expected = ft.sample(lambda x, t: x, "A3", noise=noise)
    x = ft.sample(lambda x, t, **cond: wrapper(t, x, **cond), "A3", noise=noise, said=said)
    assert x.equal(expected)
    x = ft.sample(lambda x, t: needs_rows(x, t.expand(len(x))), "A3", noise=noise, batch_size=3)
    assert_close(x, ft.sample(lambda x, t: x * t, "A3", noise=noise), 1e-6)


def test_an_error_of_the_model_itself_is_its_own():
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match=r"^the model's own$"):
        ft.sample(model, "E3", noise=torch.randn(8, 2))
    calls.clear()

    def model_that_stops(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        if len(calls) == 2:
            raise ValueError("stopped")
        return x

    with pytest.raises(ValueError, match=r"^stopped$"):
        ft.sample(model_that_stops, "E3", noise=torch.randn(8, 2))
    assert len(calls) == 2  # no other arguments are tried once a call has succeeded
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'label'"):
        ft.sample(lambda x, t, label: x, "E1", noise=torch.randn(8, 2))


def test_no_other_arguments_are_tried_when_memory_is_out():
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        if t.ndim == 0:
            raise torch.OutOfMemoryError("out of memory")
        return x

    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory$"):
        ft.sample(model, "E1", noise=torch.randn(8, 2))
    assert len(calls) == 1


# Results


class Output(dict):
    """What diffusers' networks return: a mapping with attributes."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__(sample=sample)
        self.sample = sample


@pytest.mark.parametrize(
    "model, kind, said",
    [
        (lambda x, t: (-x,), TypeError, r"got tuple of 1: pass lambda .* model\(x, t, .*\)\[0\]"),
        (lambda x, t: [-x, x], TypeError, r"got list of 2: pass lambda"),
        (lambda x, t: Output(-x), TypeError, r"got Output: pass lambda .*\.sample"),
        (lambda x, t: {"v": -x, "logits": x}, TypeError, "got dict of 'v', 'logits': return the"),
        (lambda x, t: None, TypeError, "velocity as a tensor, got NoneType"),
        (lambda x, t: x.numpy(), TypeError, "velocity as a tensor, got ndarray"),
        (lambda x, t: (x**2).mean(), ValueError, "got a single number: a loss is no velocity"),
        (lambda x, t: x[:, :1], ValueError, r"in the shape of x, \(8, 2\), got \(8, 1\)"),
        (lambda x, t: x[None], ValueError, r"in the shape of x, \(8, 2\), got \(1, 8, 2\)"),
        (lambda x, t: torch.cat([x, x]), ValueError, r"\(8, 2\), got \(16, 2\)"),
        (lambda x, t: torch.cat([x, x], 1), ValueError, r"got \(8, 4\): if half of the channels"),
        (lambda x, t: x.long(), TypeError, "as floating point, got torch.int64"),
        (lambda x, t: x > 0, TypeError, "as floating point, got torch.bool"),
        (lambda x, t: x.to(torch.complex64), TypeError, "as floating point, got torch.complex64"),
        (lambda x, t: x.to("meta"), ValueError, "on the device of x, cpu, got meta"),
        (lambda x, t: x.mul_(2), ValueError, "model changed its input x in place"),
    ],
)
@pytest.mark.parametrize("convention", ["time", "sigma"])
def test_what_is_no_velocity_is_refused(model, kind, said, convention):
    with pytest.raises(kind, match=said):
        ft.sample(model, "H1P5", noise=torch.randn(8, 2), convention=convention)


def test_a_wrong_result_is_refused_at_every_call():
    with pytest.raises(ValueError, match=r"got \(7, 2\)"):
        ft.sample(lambda x, t: x if t < 0.5 else x[1:], "E4", noise=torch.randn(8, 2))


def test_16_bit_results_and_expanded_ones_are_taken():
    noise = torch.randn(8, 2)
    x = ft.sample(lambda x, t: x.bfloat16(), "A4", noise=noise)
    assert x.dtype == torch.float32
    assert_close(x, ft.sample(lambda x, t: x, "A4", noise=noise), 2**-7)
    x = ft.sample(lambda x, t: torch.ones(1, 1).expand(8, 2), "A4", noise=noise)
    assert_close(x, noise + 1, 1e-6)


def test_in_inference_mode():
    noise = torch.randn(8, 2)
    with torch.inference_mode():
        x = ft.sample(lambda x, t: -x, "H1P2", noise=noise.clone())
    assert x.equal(ft.sample(lambda x, t: -x, "H1P2", noise=noise))


# The convention


def test_an_argument_named_sigma_needs_the_convention(noise):
    with pytest.raises(ValueError, match="second argument is 'sigma', but with convention='time'"):
        ft.sample(sigma_velocity, "A4", noise=noise)


def test_refusals_of_conventions(noise):
    with pytest.raises(ValueError, match="convention must be 'time' or 'sigma', got 'noise'"):
        ft.sample(velocity, "A4", noise=noise, convention="noise")
    with pytest.raises(ValueError, match="convention='sigma' is for a callable: a FlowModel knows"):
        ft.sample(tiny_model(), "A4", [1], convention="sigma")


def test_functions_whose_arguments_cannot_be_read(noise):
    assert_close(ft.sample(torch.add, "E2", noise=noise), (1.5**2) * noise + 0.25, 1e-12)
