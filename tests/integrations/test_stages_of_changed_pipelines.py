"""Plans with stages in pipelines that were accelerated, compiled or patched before."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from accelerated import refiner_of
from close import assert_close
from complete import complete_sd3
from newer_pipelines import newer
from pipelines import SIZE, diffusers, embeds, flux, negative, sd3
from prompt_models import conditioning
from torch import Tensor

import flowturbo as ft
from flowturbo.integrations.patches import Patch
from flowturbo.solver.steps import State

TWO = "A2 at 1/2 + E2 from 0.6"
PIPELINES = {"sd3": sd3, "flux": flux}
OWN_GRID = ft.Plan.parse("A3", grid=(0.0, 0.2, 0.5, 1.0))


def arguments(count: int = 1, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    sized = dict(height=SIZE, width=SIZE, output_type="latent", generator=generator)
    return {**embeds(count=count), **negative(count=count), **sized, **options}


def calls_of(pipe: Any) -> list[int]:
    """The rows of each call of the transformer from now on."""
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, options: rows.append(len(options["hidden_states"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("grid", ["auto", "pipeline", "corrected", "plan"])
def test_one_stage_keeps_the_grid_of_accelerate(grid):
    expected = ft.accelerate(sd3(), "A3", grid=grid)(**arguments()).images
    # Plans without and with a grid of their own: "auto" and "plan" must not be confused.
    for first in ["E2", OWN_GRID] if grid in ("auto", "plan") else ["E2"]:
        pipe = ft.accelerate(sd3(), first, grid=grid)
        assert ft.sample_stages(pipe, "A3", **arguments()).images.equal(expected)
        found = ft.sample_stages(pipe, OWN_GRID, **arguments()).images
        assert found.equal(ft.accelerate(sd3(), OWN_GRID)(**arguments()).images)
        assert pipe.scheduler.plan == ft.accelerate(sd3(), first).scheduler.plan
    stock = ft.accelerate(sd3(), "A3")(**arguments()).images
    assert stock.equal(expected) == (grid in ("auto", "pipeline"))


def dividing() -> Any:
    """A pipeline under a name of those that divide by the noise level."""
    pipe = sd3()
    pipe.__class__ = type("PRXPixelPipeline", (diffusers.StableDiffusion3Pipeline,), {})
    return pipe


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_plan_that_the_pipeline_can_not_run_is_refused_before_any_call(accelerated):
    pipe = ft.accelerate(dividing(), "A3") if accelerated else dividing()
    calls = calls_of(pipe)
    for plan in ("H2", "A2 at 1/2 + H1 from 0.6", "H2 at 1/2 to 0 + A2 from 0.12"):
        with pytest.raises(ValueError, match=r"noise level 0, by which PRXPixelPipeline div.* H"):
            ft.sample_stages(pipe, plan, **arguments())
    assert not calls
    ft.sample_stages(pipe, "H1 at 1/2 + A2 from 0.6", **arguments())  # it ends above 0
    assert calls


@pytest.mark.parametrize("accelerated", [False, True])
def test_mean_velocities_and_guidance_intervals_are_refused_before_any_call(accelerated):
    pipe = sd3()
    pipe = ft.accelerate(pipe, "E3") if accelerated else pipe
    calls = calls_of(pipe)
    guided = ft.Plan.parse("E2", guidance_interval=(0.0, 0.5))
    stages = ft.StagedPlan((ft.Stage(guided, size="1/2"), ft.Stage("E2", start=0.6)))
    for plan in (guided, stages):
        with pytest.raises(ValueError, match=r"no guidance interval, got \(0.0, 0.5\)"):
            ft.sample_stages(pipe, plan, **arguments())
    pipe.transformer.register_to_config(use_meanflow=True)
    for plan in ("A3", TWO, "E1 at 1/2 + A2 from 0.6"):
        with pytest.raises(ValueError, match=r"E steps alone for the mean velocities .*got A"):
            ft.sample_stages(pipe, plan, **arguments())
    assert not calls


def test_another_scheduler_in_the_place_of_ours_is_refused():
    pipe = ft.accelerate(sd3(), "A3")
    pipe.scheduler = other = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    for plan in ("A2", TWO):
        with pytest.raises(
            ValueError, match="has another FlowMatchEulerDiscreteScheduler: restore"
        ):
            ft.sample_stages(pipe, plan, **arguments())
    ft.restore(pipe)
    ft.sample_stages(pipe, TWO, **arguments())
    assert pipe.scheduler is other


@pytest.mark.parametrize("kind", PIPELINES)
def test_refiner_steps_in_a_pipeline_that_has_a_refiner(kind):
    pipe = PIPELINES[kind]()
    refiner = refiner_of(pipe)
    model = ft.from_pipeline(PIPELINES[kind](), refiner, image_size=SIZE)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    plan = "H1R1 at 1/2 + E1S1 from 0.6"
    c = conditioning(kind)
    expected = ft.sample(model, plan, c, noise=noise, guidance=3.0)
    ft.accelerate(pipe, "H1R1", refiner)
    options = arguments(2, guidance_scale=3.0, latents=noise)
    if kind == "flux":
        options = {name: value for name, value in options.items() if "negative" not in name}
        expected, options["latents"] = map(ft.models.text_to_image.packed, (expected, noise))
    assert_close(ft.sample_stages(pipe, plan, **options).images, expected, 1e-5)
    ft.restore(pipe)
    with pytest.raises(ValueError, match="has refiner steps, for which pipe must have a refiner"):
        ft.sample_stages(pipe, plan, **options)


def test_a_users_own_encode_prompt_stays():
    pipe = complete_sd3()
    pipe.set_progress_bar_config(disable=True)
    encode, calls = pipe.encode_prompt, []

    def own(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return encode(*args, **options)

    pipe.encode_prompt = own
    options = {"prompt": "a fox", "height": SIZE, "width": SIZE, "output_type": "latent"}
    ft.sample_stages(pipe, TWO, **options)
    assert pipe.encode_prompt is own
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="no"):
        ft.sample_stages(pipe, TWO, enlarge=fails, **options)
    assert pipe.encode_prompt is own


def test_an_encode_prompt_that_is_set_within_the_call_stays_and_encodes_anew():
    pipe = complete_sd3()
    pipe.set_progress_bar_config(disable=True)
    given: list[Any] = []

    def callback(pipe: Any, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not given:
            given.append(pipe.encode_prompt)
            Patch(pipe, "encode_prompt", lambda *args, **kw: given[0](*args, **kw))
        return values

    options = {"height": SIZE, "width": SIZE, "output_type": "latent", "guidance_scale": 1.0}
    ft.sample_stages(pipe, TWO, prompt="a fox", callback_on_step_end=callback, **options)
    assert given
    found = [pipe(prompt=p, **options, latents=torch.zeros(1, 4, 16, 16)) for p in ("a fox", "ice")]
    del pipe.encode_prompt
    expected = pipe(prompt="ice", **options, latents=torch.zeros(1, 4, 16, 16))
    assert found[1].images.equal(expected.images)
    assert not found[0].images.equal(expected.images)


def fails(images: Tensor) -> Tensor:
    raise RuntimeError("no")


def test_no_latents_are_kept_after_the_call():
    pipe = ft.accelerate(sd3(), "A3")

    def states() -> list[State]:
        gc.collect()
        return [found for found in gc.get_objects() if type(found) is State]

    before = len(states())
    ft.sample_stages(pipe, TWO, **arguments())
    assert len(states()) <= before

    def stop(pipe: Any, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            raise RuntimeError("no")  # after the last call of the first stage
        return values

    with pytest.raises(RuntimeError, match="no"):
        ft.sample_stages(pipe, TWO, callback_on_step_end=stop, **arguments())
    assert len(states()) <= before
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(pipe.scheduler.ended))
    thread.start()
    thread.join()
    assert seen == [None]
    assert pipe.scheduler.ended is None


@pytest.mark.parametrize("kind", PIPELINES)
def test_compiled_transformers_run_in_stages(kind):
    options = arguments(guidance_scale=3.0)
    if kind == "flux":
        options = {name: value for name, value in options.items() if "negative" not in name}
    expected = ft.sample_stages(PIPELINES[kind](), TWO, **options).images
    pipe = PIPELINES[kind]()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    options["generator"] = torch.Generator().manual_seed(5)
    with torch.compiler.set_stance("force_eager"):  # what is compiled is not the matter
        assert_close(ft.sample_stages(pipe, TWO, **options).images, expected, 1e-6)


def test_a_compiled_vae_is_known_for_what_it_is():
    pipe = newer("qwen")
    kind = type(ft.from_pipeline(pipe, image_size=SIZE).vae)
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert type(ft.from_pipeline(pipe, image_size=SIZE).vae) is kind


def test_a_batch_that_is_not_full_is_padded():
    """So that an image has the same bits in any company."""
    pipe = sd3()
    rows = calls_of(pipe)
    two = ft.sample_stages(pipe, TWO, batch_size=4, guidance_scale=1.0, **arguments(2)).images
    assert set(rows) == {4}
    alone = {
        name: value[1:] if isinstance(value, Tensor) else value
        for name, value in arguments(2).items()
    }
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    alone |= {"generator": None, "latents": noise[1:]}
    one = ft.sample_stages(pipe, TWO, batch_size=4, guidance_scale=1.0, **alone).images
    assert one.equal(two[1:])
