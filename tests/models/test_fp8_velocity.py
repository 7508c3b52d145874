"""A predictor in fp8: its static scales, found by a calibration, and by how much its velocity
differs from the plain one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from tiny import CONFIG, random_sit
from torch import Tensor

import flowturbo as ft
from flowturbo.models import fp8, sit
from flowturbo.models.flow_model import ReversedTime
from flowturbo.models.fp8 import Fp8Linear

BOUND = 0.03
"""The velocity's relative error with quantize="fp8" on the bundled model; 2.2 % is measured."""


@pytest.fixture(scope="module")
def digits() -> tuple[ft.FlowModel, ft.FlowModel]:
    """The bundled model, plain and in fp8."""
    plain, quantised = (
        ft.load("digits", device="cpu", quantize=quantize) for quantize in (None, "fp8")
    )
    return plain, quantised


def static_layers(network: sit.SiT) -> Iterator[Fp8Linear]:
    for block in network.blocks:
        yield from (block.attn.proj, block.mlp.fc2)


def scales(network: sit.SiT) -> Tensor:
    return torch.cat([layer.input_scale for layer in static_layers(network)])


def inputs(seed: int, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many fresh images of noise as there are times, and random labels, the null class too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(times), 1, 8, 8, generator=generator)
    return x, times, torch.randint(11, (len(times),), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("seed", [101, 102])
def test_the_bundled_models_velocity_is_within_3_percent(digits, seed):
    plain, quantised = (model.predictor for model in digits)
    x, t, y = inputs(seed, torch.rand(48, generator=torch.Generator().manual_seed(seed)))
    truth = plain(x, t, y)
    error = relative_error(quantised(x, t, y), truth)
    assert 0.005 < error < BOUND  # much less would mean that nothing was quantised
    null = torch.full_like(y, 10)
    guided = truth + 0.5 * (truth - plain(x, t, null))
    got = quantised(x, t, y)
    assert relative_error(got + 0.5 * (got - quantised(x, t, null)), guided) < 1.4 * BOUND
    # Both halves of guidance in one call, as a plan makes it.
    modulations = [
        torch.cat(halves)
        for halves in zip(
            *(quantised.modulations(quantised.t_embedder(t) + quantised.y_embedder(c))
              for c in (y, null)), strict=True
        )
    ]  # fmt: skip
    both = quantised.evaluate(x, modulations)
    assert_close(both[:48], got, 1e-6)
    assert_close(both[48:], quantised(x, t, null), 1e-6)


@torch.no_grad()
def test_on_paths_to_images_too(digits):
    """Over all times; near the image, where the velocity hangs on details, it errs by more."""
    plain, quantised = digits
    x, t, y = inputs(7, torch.zeros(24))
    found, truths = [], []
    for i in range(8):
        found.append(quantised.predictor(x, t + i / 8, y))
        truths.append(plain.predictor(x, t + i / 8, y))
        assert relative_error(found[-1], truths[-1]) < 2 * BOUND
        x = x + truths[-1] / 8
    assert relative_error(torch.stack(found), torch.stack(truths)) < BOUND


@torch.no_grad()
def test_the_margin_holds_what_other_inputs_need(digits, monkeypatch):
    """None of 48 other images saturates; the calibration alone, without a margin, would not do."""
    _, quantised = digits
    largest: dict[Fp8Linear, float] = {}
    layers = list(static_layers(quantised.predictor))
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, given: largest.update({layer: float(given[0].abs().max())})
        )
        for layer in layers
    ]
    monkeypatch.setattr(sit.SiT, "_in_fp8", lambda self: False)  # layer by layer
    quantised.predictor(*inputs(103, torch.rand(48)))
    for hook in hooks:
        hook.remove()
    used = [largest[layer] / (448 * float(layer.input_scale)) for layer in layers]
    assert max(used) < 1
    assert max(used) * fp8.MARGIN > 1
    assert min(used) > 0.1  # the range is not wasted either


@torch.no_grad()
def test_the_fused_blocks_are_the_layers_one_by_one(monkeypatch, digits):
    plain, quantised = (model.predictor for model in digits)
    case = inputs(104, torch.rand(16))
    fused, truth = quantised(*case), plain(*case)
    monkeypatch.setattr(sit.SiT, "_in_fp8", lambda self: False)
    by_layers = quantised(*case)
    errors = relative_error(fused, truth), relative_error(by_layers, truth)
    assert not fused.equal(by_layers)
    assert errors[0] < 1.25 * errors[1]


def test_a_calibration_is_deterministic_and_once(digits):
    again = ft.load("digits", device="cpu", quantize="fp8").predictor
    assert scales(again).equal(scales(digits[1].predictor))
    before = scales(again)
    again.quantize_()
    assert scales(again).equal(before)
    tiny = scales(random_sit(CONFIG, 0).quantize_())
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert scales(random_sit(CONFIG, 0).quantize_()).equal(tiny)


def test_a_calibration_that_fails_leaves_nothing_behind():
    network = random_sit(CONFIG, 0)

    def fails(*_):
        raise RuntimeError("no velocity")

    with pytest.raises(RuntimeError, match="no velocity"):
        network.quantize_(fails)
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert not network._in_fp8()
    assert scales(network.quantize_()).equal(scales(random_sit(CONFIG, 0).quantize_()))


def test_it_samples_in_the_models_own_time():
    """Of a model with reversed time noise goes to images as well."""
    network = random_sit(CONFIG, 3)
    own, reversed_ = network.quantize_(), random_sit(CONFIG, 3)
    reversed_.quantize_(ReversedTime(reversed_))
    assert not scales(own).equal(scales(reversed_))
    loaded = ft.load(random_sit(CONFIG, 3), device="cpu", convention="repa", quantize="fp8")
    assert scales(loaded.predictor.network).equal(scales(reversed_))


def test_values_beyond_the_scale_saturate():
    network = random_sit(CONFIG, 4).quantize_()
    fc2 = network.blocks[0].mlp.fc2
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        before = network(x, t, y)
        fc2.set_input_scale(fc2.input_scale / 1e4)
        after = network(x, t, y)
    assert after.isfinite().all()
    assert not after.equal(before)


def test_a_refiner_and_a_state_without_scales():
    refiner = random_sit(CONFIG.refiner(), 5).quantize_()
    assert all(layer.input_scale is None for layer in static_layers(refiner))
    v = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert refiner(v, torch.rand(2), torch.tensor([1, 2]), v).isfinite().all()
    state = random_sit(CONFIG, 6).quantize_().state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("_scale")} | {
        name: value for name, value in state.items() if name.endswith(".weight_scale")
    }
    with pytest.raises(RuntimeError, match=r"proj\.input_scale is missing: .* not calibrated"):
        random_sit(CONFIG, 7).quantize_().load_state_dict(old, strict=False)
    with torch.device("meta"):
        empty = sit.SiT(replace(CONFIG))
    for block in empty.blocks:
        for part, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
            for name in names:
                setattr(part, name, Fp8Linear(getattr(part, name), keep=name == "proj"))
    empty.to_empty(device="cpu").load_state_dict(state)  # scales come with the weights
    assert scales(empty).tolist() == [
        float(value) for name, value in state.items() if name.endswith("input_scale")
    ]
    assert empty._in_fp8()
