"""Refiners beside pipelines of every kind: they follow the calls that a pipeline makes."""

from __future__ import annotations

from typing import Any

import newer_pipelines
import pytest
import torch
from accelerated import refiner_of
from close import assert_close, relative_error
from newer_pipelines import FRAMES, KINDS, as_ours, conditions, newer, noise_for
from pipelines import SIZE, call, diffusers, embeds, flux, sd3
from torch import Tensor

import flowturbo as ft
from flowturbo.integrations.planned_pipeline import MARK
from flowturbo.integrations.refining import _combination, _tolerance
from flowturbo.models.prompt_kinds import KINDS as NETWORKS
from flowturbo.models.text_to_image import packed

PLAN = ft.Plan.parse("HPRRS", grid=[0, 0.2, 0.35, 0.5, 0.75, 1])


def model_from(kind: str, pipe: Any, refiner: Any = None) -> ft.PromptModel:
    frames = {"frames": FRAMES} if kind.startswith("wan") else {}
    return ft.from_pipeline(pipe, refiner, image_size=SIZE, **frames)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_refiner_in_the_pipeline_does_what_it_does_in_a_model(kind, guidance):
    pipe = newer(kind)
    refiner = refiner_of(pipe)
    model = model_from(kind, pipe, refiner)
    noise, c = noise_for(pipe, model), conditions(kind)
    expected = ft.sample(model, PLAN, c, guidance=guidance, noise=noise)
    without = ft.Plan.parse("HPPPE", grid=PLAN.grid)
    assert relative_error(
        ft.sample(model, without, c, guidance=guidance, noise=noise), expected
    ) > (1e-3)
    with ft.accelerated(pipe, PLAN, refiner, grid="plan"):
        latents = newer_pipelines.call(kind, pipe, guidance, noise)
    assert_close(as_ours(kind, pipe, latents), expected, 2e-5)


def test_true_guidance_of_flux_is_followed_too():
    """Written out over the modules: offsets are guided as the velocities are."""
    pipe = flux()
    refiner = refiner_of(pipe)
    negative = embeds(4)
    halves = [embeds(), negative]
    with ft.accelerated(pipe, "H1R1", refiner, grid="plan"):
        latents = call(
            pipe, true_cfg_scale=2.0, **{f"negative_{k}": v for k, v in negative.items()}
        )

    def run(module: Any, x: Tensor, level: float) -> Tensor:
        first, second = (
            -module(
                hidden_states=x,
                timestep=torch.full((2,), level),
                guidance=torch.full((2,), 3.5),
                encoder_hidden_states=half["prompt_embeds"],
                pooled_projections=half["pooled_prompt_embeds"],
                txt_ids=torch.zeros(5, 3),
                img_ids=pipe._prepare_latent_image_ids(
                    2, SIZE // 4, SIZE // 4, torch.device("cpu"), torch.float32
                ),
                return_dict=False,
            )[0]
            for half in halves
        )
        return second + 2 * (first - second)

    shape = (1, 4, SIZE // 2, SIZE // 2)
    x = packed(torch.cat([torch.randn(shape, generator=_seeded(i)) for i in range(2)]))
    with torch.no_grad():
        d = run(pipe.transformer, x, 1.0)
        later = run(pipe.transformer, x + 0.5 * d, 0.5)
        x, v = x + 0.25 * (d + later), later
        d = run(refiner, torch.cat([x, v], -1), 0.5) + v
        later = run(refiner, torch.cat([x + 0.5 * d, v], -1), 0.0) + d
    assert_close(latents, x + 0.25 * (d + later), 2e-5)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "scale"), [("Flux", 1.8), ("Flux", 5.0), ("QwenImage", 4.0)])
def test_the_scale_of_guidance_is_seen_in_the_result(dtype, name, scale):
    """In 16 bits, too: the pipeline's rounding averages out over the latents."""
    kind = NETWORKS[f"{name}Transformer2DModel"]
    second = torch.randn(2, 256, 64, generator=_seeded(0)).to(dtype)
    first = second + (0.1 * torch.randn(2, 256, 64, generator=_seeded(1))).to(dtype)
    guided = second + scale * (first - second)
    if kind.rescales:
        guided = kind.rescale_latents(guided, first)
    weight, error, rescaled = _combination(guided.float(), [first.float(), second.float()], kind)
    assert abs(float(weight) - scale) < (1e-4 if dtype == torch.float32 else 0.03 * scale)
    assert float(error) < _tolerance(dtype)
    assert rescaled == kind.rescales
    other = guided.float() + 3 * _tolerance(dtype) * guided.float().norm() / guided.numel() ** 0.5
    assert float(_combination(other, [first.float(), second.float()], kind)[1]) > _tolerance(dtype)


def calls_kept(pipe: Any) -> int:
    return len(vars(pipe)[MARK].scheduler.refiner._memory.calls)


def test_calls_outside_the_pipeline_are_not_kept_and_failed_ones_leave_nothing():
    pipe = sd3()
    ft.accelerate(pipe, "H1P1R1", refiner_of(pipe))
    expected = call(pipe)
    given = embeds()
    for _ in range(9):
        with torch.no_grad():
            pipe.transformer(
                torch.randn(2, 4, 8, 8), given["prompt_embeds"], given["pooled_prompt_embeds"],
                torch.full((2,), 500.0),
            )  # fmt: skip
        assert calls_kept(pipe) == 0
    assert call(pipe).equal(expected)

    def fail(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
        if index == 1:
            raise RuntimeError("stopped")
        return kept

    with pytest.raises(RuntimeError, match="stopped"):
        call(pipe, callback_on_step_end=fail)
    handle = pipe.transformer.proj_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(pipe)
    handle.remove()
    assert call(pipe).equal(expected)
    ft.restore(pipe)
    assert not pipe.transformer._forward_hooks


def test_pipelines_that_share_a_network_have_their_own_refiners():
    """Even if one runs between two steps of the other."""
    first = sd3()
    second = sd3(transformer=first.transformer)
    refiners = refiner_of(first), refiner_of(first, seed=12)
    expected = []
    for pipe, refiner in zip((first, second), refiners, strict=True):
        with ft.accelerated(pipe, "H1P1R1", refiner):
            expected.append(call(pipe))
    assert relative_error(expected[0], expected[1]) > 1e-3
    for pipe, refiner in zip((first, second), refiners, strict=True):
        ft.accelerate(pipe, "H1P1R1", refiner)
    between = []

    def run_the_other(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
        between.append(call(second))
        return kept

    assert call(first, callback_on_step_end=run_the_other).equal(expected[0])
    assert len(between) == 3
    assert all(result.equal(expected[1]) for result in between)
    ft.restore(first)
    assert call(second).equal(expected[1])


@pytest.mark.parametrize("how", ["skip-layer guidance", "a result changed on the way"])
def test_steps_that_a_refiner_cannot_follow_are_refused(how):
    pipe = sd3()
    ft.accelerate(pipe, "H1R1", refiner_of(pipe))
    options: dict[str, Any] = {}
    if how == "skip-layer guidance":
        options = dict(
            skip_guidance_layers=[0], skip_layer_guidance_start=-0.1, skip_layer_guidance_stop=1.0
        )
    else:
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda output, *rest, **more: step(1.1 * output, *rest, **more)
    with pytest.raises(ValueError, match="a refiner follows steps of one call of the network"):
        call(pipe, **options)


CONDITIONED = {
    "fill": ("FluxFillPipeline", dict(in_channels=32, out_channels=16)),
    "control": ("FluxControlPipeline", dict(in_channels=32, out_channels=16)),
    "kontext": ("FluxKontextPipeline", {}),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_networks_that_read_images_beside_the_latents_are_refused_early(name):
    kind, config = CONDITIONED[name]
    from pipelines import flux_transformer

    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=flux_transformer(**config),
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    parts = {
        k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")
    }
    pipe = getattr(diffusers, kind)(**parts)
    with pytest.raises(
        ValueError, match=r"reads 32 channels and makes 16|images beside the latents"
    ):
        ft.from_pipeline(pipe)
    plain = flux()
    with pytest.raises(
        ValueError, match=r"reads 32 channels and makes 16|images beside the latents"
    ):
        ft.accelerate(pipe, "H1R1", refiner_of(plain))
    assert not pipe.transformer._forward_hooks
    ft.accelerate(pipe, "H1P1")  # without a refiner they run
