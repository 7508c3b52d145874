"""Fields: the hoisted path is the step-by-step path, and makes each modulation once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from close import assert_close
from tiny import CONFIG, HEAD_DIM_72, random_sit, tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo.models.sit import SiT
from flowturbo.sampling import velocity_field
from flowturbo.sampling.velocity_field import GuidedField, HoistedField, field_of
from flowturbo.solver.steps import State

EVERY_STEP = "H1P1R2S1E1A1B1C2U4D2X2A1"


def integrate(field: velocity_field.Field, plan: ft.Plan, x: Tensor) -> Tensor:
    state = State(x)
    for step, t0, t1 in plan.schedule():
        state = step(field, state, t0, t1)
    return state.x


def both(
    model: ft.FlowModel, plan: ft.Plan, guidance: float | Tensor | None, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """The same images by the step-by-step path and by the hoisted one."""
    noise, labels = (
        ft.noise(model.latent_shape, 4, range(3)).to(model.dtype),
        torch.tensor([1, 8, 3]),
    )
    with torch.no_grad():
        plain, hoisted = (
            integrate(f(model, plan, labels, guidance, channels), plan, noise)
            for f in (GuidedField, HoistedField)
        )
    return plain, hoisted


@pytest.mark.parametrize(
    "config", [CONFIG, replace(HEAD_DIM_72, learned_sigma=True)], ids=["48", "72"]
)
@pytest.mark.parametrize("guidance", [None, 1.7, "one an image"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
def test_the_hoisted_path_is_the_step_by_step_path(config, guidance, interval):
    model = tiny_model(config, dtype=torch.float64)
    scale = (
        torch.tensor([1.3, 2.0, 0.5]).double().view(3, 1, 1, 1)
        if guidance == "one an image"
        else guidance
    )
    plain, hoisted = both(
        model, ft.Plan.parse(EVERY_STEP, shift=1.5, guidance_interval=interval), scale
    )
    assert_close(hoisted, plain, 1e-13)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Calls with guidance and move in one, and the null class by its index."""
    monkeypatch.setattr(velocity_field, "_on_gpu", lambda at: True)


@pytest.mark.parametrize("guidance", [None, 1.7, "one an image"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
@pytest.mark.parametrize("convention", ["sit", "repa"])
def test_the_path_of_a_gpu_is_the_step_by_step_path(as_on_a_gpu, guidance, interval, convention):
    networks = random_sit(CONFIG, 5), random_sit(CONFIG.refiner(), 6)
    model = ft.load(*networks, convention=convention, device="cpu", dtype=torch.float64)
    scale = (
        torch.tensor([1.3, 2.0, 0.5]).double().view(3, 1, 1, 1)
        if guidance == "one an image"
        else guidance
    )
    plan = ft.Plan.parse(EVERY_STEP, shift=1.5, guidance_interval=interval)
    plain, hoisted = both(model, plan, scale)
    assert_close(hoisted, plain, 1e-12)


def test_the_path_of_a_gpu_takes_one_call_a_network_and_no_other_update(as_on_a_gpu, monkeypatch):
    model = tiny_model()
    calls = []
    for network in (model.predictor, model.refiner):
        original = network.evaluate_and_move
        monkeypatch.setattr(
            network,
            "evaluate_and_move",
            lambda *a, of=original, **k: calls.append(k) or of(*a, **k),
        )
    plan, exponential = ft.Plan.parse("H1P2R2"), ft.Plan.parse("U2D2X2")
    monkeypatch.setattr("flowturbo.solver.state.velocity_update", None)
    ft.sample(model, plan, [1, 8, 3], guidance=2.0, seed=0)
    assert [sorted(k) for k in calls] == [[]] * 2 + [["ahead"]] * 2 + [["base", "v"]] * 4
    calls.clear()
    ft.sample(model, exponential, [1, 8, 3], guidance=2.0, seed=0)
    assert calls == [{}] * (2 + 2 + 3)


def test_the_path_of_a_gpu_edits_and_inpaints(as_on_a_gpu, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    source = ft.noise(model.latent_shape, 4, range(2)).double()
    mask = torch.zeros(2, *model.latent_shape[1:], dtype=torch.bool)
    mask[..., :4] = True
    args = model, "H1P2R1", source, mask, [1, 2]
    fused = ft.inpaint(*args, guidance=2.0, seed=3, output="latents")
    monkeypatch.setattr(velocity_field, "_on_gpu", lambda at: False)
    assert_close(fused, ft.inpaint(*args, guidance=2.0, seed=3, output="latents"), 1e-12)


class Damped(SiT):
    def evaluate(self, *args):
        return 0.5 * super().evaluate(*args)


def damped(network):
    network.__class__ = Damped


def other_adaln(network):
    layer = network.blocks[0].adaLN_modulation
    network.blocks[0].adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), layer[1])
    network.blocks[0].adaLN_modulation.register_forward_hook(lambda *given: 2 * given[-1])


class OtherLabels(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, y):
        return 2 * self.table(y)


def other_labels(network):
    network.y_embedder = OtherLabels(network.y_embedder.embedding_table)


def hooked_times(network):
    network.t_embedder.register_forward_hook(lambda *given: 2 * given[-1])


def hooked_adaln(network):
    network.final_layer.adaLN_modulation.register_forward_hook(lambda *given: 2 * given[-1])


@pytest.mark.parametrize("change", [damped, other_adaln, other_labels, hooked_times, hooked_adaln])
@pytest.mark.parametrize("convention", ["sit", "repa"])
def test_on_a_gpu_too_a_changed_network_is_what_its_user_made_it(
    as_on_a_gpu, monkeypatch, change, convention
):
    networks = random_sit(CONFIG, 5), random_sit(CONFIG.refiner(), 6)
    model = ft.load(*networks, convention=convention, device="cpu", dtype=torch.float64)
    before = both(model, ft.Plan.parse(EVERY_STEP), 1.7)[0]
    for network in networks:
        change(network)
    plain, hoisted = both(model, ft.Plan.parse(EVERY_STEP), 1.7)
    assert_close(hoisted, plain, 1e-12)
    assert not torch.allclose(plain, before)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_in_lower_precision_they_agree_to_rounding(dtype, bound):
    plain, hoisted = both(tiny_model(dtype=dtype), ft.Plan.parse("H1P2R2"), 1.7)
    assert_close(hoisted, plain, bound)


def test_a_reversed_predictor_is_hoisted_too():
    sit = random_sit(CONFIG, 5)
    model = ft.load(
        sit, random_sit(CONFIG.refiner(), 6), convention="repa", device="cpu", dtype=torch.float64
    )
    assert isinstance(
        field_of(model, ft.Plan.parse("H1"), {"labels": torch.tensor([1])}, None, 4), HoistedField
    )
    plain, hoisted = both(model, ft.Plan.parse("H1P1R1"), 1.7)
    assert_close(hoisted, plain, 1e-13)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("times_that_fit", [0, 1, 2, 5])
def test_stretches_of_any_length_give_the_same(monkeypatch, request, times_that_fit, gpu):
    if gpu:
        request.getfixturevalue("as_on_a_gpu")
    model = tiny_model(dtype=torch.float64)
    plan = ft.Plan.parse("H3P2R2S1E2")
    _, whole = both(model, plan, 1.7)
    one_time = (CONFIG.depth * 6 + 2) * CONFIG.hidden * 6 * 8  # 3 images, 2 halves
    monkeypatch.setattr(velocity_field, "_HOISTED_BYTES", times_that_fit * one_time)
    plain, parts = both(model, plan, 1.7)
    assert_close(parts, whole, 1e-13)
    assert_close(parts, plain, 1e-13)


def test_each_modulation_is_made_once_and_the_null_class_once_for_all_images(monkeypatch):
    model = tiny_model()
    rows = []
    for network in (model.predictor, model.refiner):
        original = network.modulations
        monkeypatch.setattr(
            network,
            "modulations",
            lambda c, of=original: rows.append(c.shape[:-1].numel()) or of(c),
        )
    plan = ft.Plan.parse("H4P2R2")
    ft.sample(model, plan, [1, 8, 3], guidance=2.0, seed=0)
    predictor, refiner = (
        {c.t for c in plan.calls if c.refiner == which} for which in (False, True)
    )
    assert sum(rows) == (len(predictor) + len(refiner)) * (3 + 1)
    assert len(rows) == 2  # all times of each network at once


def test_a_network_without_modulations_takes_the_plain_path():
    model = tiny_model()
    model.refiner = lambda x, t, y, v=None: v
    field = field_of(model, ft.Plan.parse("H1R1"), {"labels": torch.tensor([1])}, 2.0, 3)
    assert type(field) is GuidedField


def test_a_plan_knows_the_calls_it_makes():
    model = tiny_model()
    plan = ft.Plan.parse("H2P1R1S1A1", guidance_interval=(0.3, 1.0))
    calls = []

    class Noting(GuidedField):
        def _run(self, network, x, t, v):
            calls.append((network is model.refiner, t, self._scale(t) is not None))
            return super()._run(network, x, t, v)

    integrate(
        Noting(model, plan, torch.tensor([1]), 2.0, 3), plan, ft.noise(model.latent_shape, 0, [0])
    )
    assert calls == [tuple(c) for c in plan.calls]
