"""Plans with stages on class-conditional models of several sizes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from fake_recorder import Fake
from other_sizes import second_reading
from scipy.fft import dctn, idctn
from sized_models import BOTH, GREY, LABELS, Program, low_frequencies, model_of, noise
from tiny import CONFIG, random_sit, tiny_model
from torch import Tensor

import flowturbo as ft

TWO = "H1P1 at 1/2 + H1A1 from 0.6"


def grid_of(start: float, end: float, steps: int, shift: float) -> list[float]:
    """Times from the noise level `start` to `end`, in equal steps before the shift."""
    first, last = (s / (shift - (shift - 1) * s) for s in (start, end))
    levels = [first + (last - first) * i / steps for i in range(steps + 1)]
    return [1 - shift * s / (1 + (shift - 1) * s) for s in levels]


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("first, second", [("HP", "H"), ("H", "HR"), ("HR", "HP")])
def test_stages_are_those_of_an_independent_program(first, second, scale):
    model = model_of(dtype=torch.float64)
    program, whole = Program(model, LABELS, scale), noise()
    end = 0.7 / (0.7 + 2 * 0.3)
    small = low_frequencies(whole, 4)
    x, v = program.run(small, first, grid_of(1.0, end, len(first), 0.5))
    estimate, low = x + end * v, x - (1 - end) * v
    spectrum = dctn(whole.numpy(), axes=(2, 3), norm="ortho")
    spectrum[..., :4, :4] = dctn(low.numpy(), axes=(2, 3), norm="ortho")
    larger = torch.from_numpy(idctn(spectrum, axes=(2, 3), norm="ortho"))
    x = 0.3 * F.interpolate(estimate, (8, 8), mode="bicubic") + 0.7 * larger
    expected, _ = program.run(x, second, grid_of(0.7, 0.0, len(second), 1.0))

    plan = f"{text(first)} at 1/2 + {text(second)} from 0.7"
    found = ft.sample(model, plan, LABELS, noise=whole, guidance=scale)
    assert found.dtype == torch.float64
    assert_close(found, expected, 1e-12)


def text(letters: str) -> str:
    return "".join(f"{letter}1" for letter in letters)


def test_its_own_size_is_what_it_was():
    """To the bit: with further sizes and without, and resized there and back."""
    options: Any = dict(seed=3, guidance=1.5)
    expected = ft.sample(tiny_model(CONFIG), "H1P1R1", LABELS, **options)
    model = model_of()
    for same in (model, model.resized(8), model.resized(4).resized(8)):
        assert ft.sample(same, "H1P1R1", LABELS, **options).equal(expected)
    assert ft.sample(model, "H1P1R1 at 1", LABELS, **options).equal(expected)


def test_a_guidance_interval_of_a_stage():
    """Outside of it guidance changes nothing."""
    model = model_of()
    interval = ft.Plan.parse("E2", guidance_interval=(0.0, 0.3))
    plan = ft.StagedPlan((ft.Stage(interval, "1/2"), ft.Stage(interval, start=0.6)))
    calls: list[tuple[int, ...]] = []
    forward = model.predictor.evaluate  # type: ignore[attr-defined]
    model.predictor.evaluate = lambda x, m, v=None: (  # type: ignore[attr-defined]
        calls.append((x.shape[2], len(m[0]))) or forward(x, m, v)
    )
    ft.sample(model, plan, LABELS, seed=0, guidance=2.0)
    assert calls == [(4, 6), (4, 6), (8, 3), (8, 3)]


def test_images_in_any_order_and_split_are_the_same_to_the_last_bit():
    model, N = model_of(), 5
    plan, labels, start = "H1R1 at 1/2 to 0.2 + H1A1 from 0.5", torch.arange(5), noise(5).float()
    for sizes in (2, (4, 2)):
        options: Any = dict(batch_size=sizes, guidance=1.5)
        base = ft.sample(model, plan, labels, noise=start, **options)
        for rows in (torch.randperm(N), *torch.randperm(N).split([1, 4])):
            part = ft.sample(model, plan, labels[rows], noise=start[rows], **options)
            assert part.equal(base[rows])


def test_with_reversed_time():
    """As its negative: x at t of the one is x at 1 - t of the other, with the opposite velocity."""
    sit = random_sit(BOTH, 0)
    model = ft.load(sit, device="cpu", dtype=torch.float64, convention="repa")
    assert model.sides == (8, 4)

    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return -second_reading(sit, x, torch.full_like(x[:, 0, 0, 0], 1 - float(t)), labels)

    found = ft.sample(model, TWO, torch.tensor(LABELS), noise=noise())
    expected = ft.sample(velocity, TWO, torch.tensor(LABELS), noise=noise())
    assert_close(found, expected, 1e-12)


def test_in_fp8():
    quantised = model_of(quantize="fp8")
    found, exact = (ft.sample(m, TWO, LABELS, seed=0) for m in (quantised, model_of()))
    assert not found.equal(exact)
    assert_close(found, exact, 0.1)


def test_each_stage_is_captured_once_and_a_resized_model_shares_its_graphs():
    model, plain, recorder = model_of(), model_of(), Fake()
    model.captures.recorder = recorder
    options: Any = dict(guidance=1.5)
    for seed in (1, 2, 3):
        found = ft.sample(model, TWO, LABELS, seed=seed, **options)
        assert found.equal(ft.sample(plain, TWO, LABELS, seed=seed, **options))
    assert recorder.recorded == 2
    assert "to a stage of 4 x 4" in ft.summary(model)
    small = model.resized(4)
    for seed in (1, 2, 3):
        found = ft.sample(small, "A2", LABELS, seed=seed, **options)
        assert found.equal(ft.sample(plain.resized(4), "A2", LABELS, seed=seed, **options))
    assert recorder.recorded == 3
    assert len(model.captures.report()) == 3


def test_stages_are_captured_ahead():
    model, recorder = model_of(), Fake()
    model.captures.recorder = recorder
    captures = ft.compile(model, TWO, 3)
    found = ft.sample(model, TWO, LABELS, seed=1, guidance=2.0)
    assert (recorder.recorded, [c.hits for c in captures]) == (2, [1, 1])
    assert found.equal(ft.sample(model_of(), TWO, LABELS, seed=1, guidance=2.0))


def test_enlarging_in_pixels_is_that_of_the_latents_but_for_bytes():
    """Where the latents are the pixels: cubic interpolation of both, one of them rounded."""
    model = model_of(GREY, vae="pixels")
    options: Any = dict(seed=0, guidance=1.5)
    # The latents of random weights are large; bytes cut them off.
    with torch.no_grad():
        model.predictor.final_layer.linear.weight.mul_(0.02)  # type: ignore[attr-defined]
    plan = "E2 at 1/2 + E1 from 0.99"
    latents, pixels = (
        ft.sample(model, plan, LABELS, enlarge=where, **options) for where in ("latents", "pixels")
    )
    assert not latents.equal(pixels)
    assert float((latents - pixels).abs().max()) < 0.05


def test_stages_at_sizes_that_it_was_not_trained_on_must_be_asked_for():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"a stage needs 4 x 4; to try it, .*\.sides \+= \(4,\)"):
        ft.sample(model, "A2 at 1/2 + A1 from 0.6", LABELS, seed=0)
    model.sides += (4,)
    found = ft.sample(model, "A2 at 1/2 + A1 from 0.6", LABELS, seed=0)
    assert found.equal(ft.sample(model_of(), "A2 at 1/2 + A1 from 0.6", LABELS, seed=0))
    with pytest.warns(UserWarning, match="latents of 4 x 4, which the refiner was not trained on"):
        ft.sample(model, "H1R1 at 1/2 + A1 from 0.6", LABELS, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ft.sample(model, "A2 at 1/2 + H1R1 from 0.6", LABELS, seed=0)
        ft.sample(model_of(), "H1R1 at 1/2 + A1 from 0.6", LABELS, seed=0)


def test_stages_of_a_larger_image():
    """The model's own size is then a stage's."""
    with pytest.warns(UserWarning, match="none that the model was trained on"):
        model = model_of().resized(16)
    assert ft.sample(model, "A2 at 1/2 + A1 from 0.6", LABELS, seed=0).shape == (3, 4, 16, 16)
    with pytest.raises(ValueError, match="on latents of 4 x 4, 8 x 8, and a stage needs 12 x 12"):
        ft.sample(model, "A2 at 3/4 + A1 from 0.6", LABELS, seed=0)
