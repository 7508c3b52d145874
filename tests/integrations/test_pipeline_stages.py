"""Plans with stages in diffusers pipelines, against models made from the same pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close
from complete import complete_flux, complete_sd3
from fake_recorder import Fake
from newer_pipelines import as_ours, newer, padded, prompts
from newer_pipelines import conditions as newer_conditions
from pipelines import SIZE, call, diffusers, embeds, flux, negative, sd3
from prompt_models import conditioning
from torch import Tensor

import flowturbo as ft
from flowturbo.integrations.planned_pipeline import MARK
from flowturbo.models.text_to_image import packed

TWO = "A2 at 1/2 + H1A1 from 0.6"
THREE = "E1 at 1/4 to 0.3 + A2 at 1/2 from 0.8 + E2 from 0.5"
DONE_FIRST = "A2 at 1/2 to 0 + E1 from 0.12"
PIPELINES = {"sd3": sd3, "flux": flux}
SCALE = {"sd3": 3.0, "flux": 3.5}


def arguments(kind: str, count: int = 2, **options: Any) -> dict[str, Any]:
    prompts = embeds(count=count)
    if kind == "sd3":
        prompts |= negative(count=count)
    sized = dict(height=SIZE, width=SIZE, guidance_scale=SCALE[kind], output_type="latent")
    return {**prompts, **sized, **options}


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def drawn(model: ft.PromptModel, count: int = 2) -> Tensor:
    """What the pipeline draws from the generators."""
    return torch.cat([torch.randn(1, *model.latent_shape, generator=g) for g in generators(count)])


@pytest.mark.parametrize(
    "plan, enlarge", [(TWO, "latents"), (THREE, "latents"), (DONE_FIRST, "pixels")]
)
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_and_its_model_make_the_same_images(kind, plan, enlarge):
    pipe = PIPELINES[kind]()
    options = arguments(kind, generator=generators())
    found = ft.sample_stages(pipe, plan, enlarge=enlarge, **options).images
    model = ft.from_pipeline(PIPELINES[kind](), image_size=SIZE)
    expected = ft.sample(
        model,
        plan,
        conditioning(kind),
        noise=drawn(model),
        guidance=SCALE[kind],
        enlarge=enlarge,
    )
    # In pixels, a value next to a half may round to another byte.
    bound = 1e-5 if enlarge == "latents" else 1e-3
    assert_close(found, packed(expected) if kind == "flux" else expected, bound)


@pytest.mark.parametrize("plan", [TWO, DONE_FIRST])
@pytest.mark.parametrize("kind", ["qwen", "zimage"])
def test_newer_pipelines_and_their_models_make_the_same_images(kind, plan):
    pipe, rows = newer(kind), prompts(kind)
    model = ft.from_pipeline(newer(kind), image_size=SIZE)
    options: dict[str, Any] = {f"{half}prompt_embeds": part for half, part in rows.items()}
    if kind == "qwen":
        lengths = {h: torch.tensor([len(row) for row in part]) for h, part in rows.items()}
        options = {name: padded(part) for name, part in options.items()}
        options |= {
            f"{half}prompt_embeds_mask": torch.arange(int(n.max())) < n[:, None]
            for half, n in lengths.items()
        }
    options |= {"true_cfg_scale": 3.0} if kind == "qwen" else {"guidance_scale": 2.0}
    options |= dict(height=SIZE, width=SIZE, output_type="latent", generator=generators())
    for sizes in (None, 1):
        found = ft.sample_stages(pipe, plan, batch_size=sizes, **options).images
        options["generator"] = generators()
        expected = ft.sample(model, plan, newer_conditions(kind), noise=drawn(model), guidance=3.0)
        assert_close(as_ours(kind, pipe, found), expected, 1e-5)


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("plan", ["H1A2", "E3 at 1"])
def test_one_stage_is_an_accelerated_pipeline_to_the_bit(kind, plan):
    options = arguments(kind, generator=generators())
    found = ft.sample_stages(PIPELINES[kind](), plan, **options).images
    pipe = ft.accelerate(PIPELINES[kind](), plan.removesuffix(" at 1"))
    options["generator"] = generators()
    assert found.equal(pipe(**options).images)
    other = ft.accelerate(PIPELINES[kind](), "A5")
    options["generator"] = generators()
    assert ft.sample_stages(other, plan, **options).images.equal(found)


@pytest.mark.parametrize("kind", PIPELINES)
def test_afterwards_the_pipeline_is_as_it_was(kind):
    pipe = PIPELINES[kind]()
    pipe.transformer.requires_grad_(True).train()
    expected = call(pipe)

    def found() -> Any:
        """All but what a call notes of its arguments."""
        return type(pipe), pipe.scheduler, pipe.components, set(vars(pipe)), pipe.config

    before = found()
    ft.sample_stages(pipe, TWO, **arguments(kind, generator=generators()))
    assert found() == before
    assert pipe.transformer.training
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    assert call(pipe).equal(expected)
    with pytest.raises(RuntimeError, match="no"):
        ft.sample_stages(pipe, TWO, enlarge=fails, **arguments(kind, generator=generators()))
    assert found() == before


def fails(images: Tensor) -> Tensor:
    raise RuntimeError("no")


def test_an_accelerated_pipeline_keeps_a_graph_for_each_stage():
    pipe = ft.accelerate(sd3(), "A3", graph=True)
    captures = getattr(pipe, MARK).captures
    captures.recorder = Fake()
    options = arguments("sd3")
    results = [
        ft.sample_stages(pipe, TWO, generator=generators(), **options).images for _ in range(3)
    ]
    assert results[0].equal(results[1])
    assert results[1].equal(results[2])
    assert captures.recorder.recorded == 2
    sides = [next(iter(c.inputs.values())).shape for c in captures.report()]
    assert len(set(sides)) == 2
    assert ft.summary(pipe).startswith("plan A3")
    assert_close(
        results[0], ft.sample_stages(sd3(), TWO, generator=generators(), **options).images, 1e-4
    )
    expected = call(ft.accelerate(sd3(), "A3"))
    assert_close(call(pipe), expected, 1e-4)


@pytest.mark.parametrize("kind", PIPELINES)
def test_any_split_into_batches_gives_the_same_images(kind):
    options = arguments(kind, count=5)
    pipe = PIPELINES[kind]()

    def run(rows: list[int], sizes: Any) -> Tensor:
        chosen = {k: v[rows] if isinstance(v, Tensor) else v for k, v in options.items()}
        chosen["generator"] = [generators(5)[i] for i in rows]
        return ft.sample_stages(pipe, TWO, batch_size=sizes, **chosen).images

    for sizes in (2, (3, 2)):
        whole = run([0, 1, 2, 3, 4], sizes)
        for rows in ([3], [4, 0, 2]):
            assert run(rows, sizes).equal(whole[rows])
    assert_close(run([0, 1, 2, 3, 4], None), whole, 1e-5)


def test_images_per_prompt_and_every_kind_of_output():
    pipe = complete_sd3()
    pipe.set_progress_bar_config(disable=True)
    common: Any = dict(
        prompt=["a fox", "snow"], height=SIZE, width=SIZE, num_images_per_prompt=2, batch_size=1
    )
    results = {}
    for kind in ("pil", "np", "pt", "latent"):
        generator = torch.Generator().manual_seed(3)
        results[kind] = ft.sample_stages(pipe, TWO, output_type=kind, generator=generator, **common)
        assert len(results[kind].images) == 4
    generator = torch.Generator().manual_seed(3)
    (images,) = ft.sample_stages(
        pipe, TWO, output_type="np", return_dict=False, generator=generator, **common
    )
    assert np.array_equal(images, results["np"].images)
    as_bytes = [np.asarray(image) for image in results["pil"].images]
    assert np.array_equal(np.stack(as_bytes), (images * 255).round().astype("uint8"))
    assert type(results["pil"]).__name__ == "StableDiffusion3PipelineOutput"


def test_texts_are_encoded_once(monkeypatch):
    pipe, calls = complete_flux(), []
    pipe.set_progress_bar_config(disable=True)
    forward = pipe.text_encoder_2.forward
    monkeypatch.setattr(
        pipe.text_encoder_2, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    options: Any = dict(height=SIZE, width=SIZE, output_type="latent")
    found = ft.sample_stages(
        pipe, TWO, prompt="a fox", generator=torch.Generator().manual_seed(1), **options
    ).images
    assert len(calls) == 1
    model = ft.from_pipeline(pipe, image_size=SIZE)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    expected = ft.sample(model, TWO, "a fox", noise=noise, guidance=3.5)
    assert_close(found, packed(expected), 1e-5)
    given = ft.sample_stages(pipe, TWO, prompt="a fox", latents=packed(noise), **options).images
    assert_close(given, found, 1e-6)


def test_callbacks_see_every_step_of_every_stage():
    seen = []

    def callback(pipe: Any, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, values["latents"].shape[-1]))
        return values

    ft.sample_stages(sd3(), TWO, **arguments("sd3"), callback_on_step_end=callback)
    # One step of diffusers is one call: two of the first stage, three of the second.
    assert seen == [(0, 8), (1, 8), (0, 16), (1, 16), (2, 16)]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(image=torch.zeros(1, 3, 8, 8)), "makes images from prompts alone, got image"),
        (dict(strength=0.5), "makes images from prompts alone, got strength"),
        (dict(width=None), "height and width must be given both or not at all, got 32 and None"),
        (dict(height=30), "image_size must be multiples of 4"),
        (dict(latents=torch.zeros(2, 4, 8, 8)), r"latents must have shape \(2, 4, 16, 16\), got"),
        (dict(batch_size=(1, 2, 3)), "one for each of the 2 stages"),
        (dict(plan="A2", batch_size=2), "batch_size must be left out for plan A2, which has one"),
        (dict(prompt_embeds=None), "prompt or prompt_embeds must be given"),
        (
            dict(plan="A2 at 1/2 + H1R1 from 0.5"),
            r"H1R1 from 0\.5 has refiner steps, for which pipe",
        ),
        (dict(plan="H1R1 at 1/2 + A2 from 0.5"), r"A2 from 0\.5 has refiner steps, for which pipe"),
        (dict(plan="H1S1"), "H1S1 has refiner steps, for which pipe must have a refiner: restore"),
    ],
)
def test_arguments_that_stages_do_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        ft.sample_stages(sd3(), **{"plan": TWO, **arguments("sd3"), **options})


def test_pipelines_that_stages_do_not_take():
    with pytest.raises(TypeError, match="pipe must have one of the transformers"):
        ft.sample_stages(diffusers.DDPMPipeline(None, None), TWO, prompt="")
