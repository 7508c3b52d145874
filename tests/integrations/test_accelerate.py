"""accelerate(): a plan inside diffusers' own pipelines, with a refiner, fused adaLN, captures."""

from __future__ import annotations

import threading
from typing import Any

import pipelines
import pytest
import torch
from accelerated import refiner_of
from close import assert_close, relative_error
from fake_recorder import Fake
from pipelines import (
    SIZE,
    call,
    embeds,
    flux,
    flux_transformer,
    negative,
    sd3,
    sd3_transformer,
)
from torch import Tensor

import flowturbo as ft
from flowturbo.integrations.planned_pipeline import MARK
from flowturbo.models.text_to_image import packed

MAKERS = {"sd3": sd3, "flux": flux}


@pytest.mark.parametrize("kind", MAKERS)
def test_an_e_plan_makes_what_the_pipeline_made(kind):
    pipe = MAKERS[kind]()
    before = call(pipe, num_inference_steps=5)
    with ft.accelerated(pipe, "E5"):
        assert_close(call(pipe, num_inference_steps=5), before, 1e-6)
        assert_close(
            call(pipe, num_inference_steps=30), before, 1e-6
        )  # which means nothing any more
    with ft.accelerated(pipe, "H1P3"):
        assert relative_error(call(pipe, num_inference_steps=4), before) > 1e-3


def heun_by_hand(
    pipe: Any, levels: list[float], plan: str, refiner: Any = None, guidance: float = 2.5
) -> Tensor:
    """H, P and R written out over the modules of an SD3 pipeline, for what `call` asks of it."""
    prompts = embeds() | negative()

    def run(module: Any, x: Tensor, level: float, v: Tensor | None = None) -> Tensor:
        x = torch.cat([x, x]) if v is None else torch.cat([torch.cat([x, v], 1)] * 2)
        out = module(
            hidden_states=x,
            timestep=torch.full((4,), 1000 * level),
            encoder_hidden_states=torch.cat(
                [prompts["negative_prompt_embeds"], prompts["prompt_embeds"]]
            ),
            pooled_projections=torch.cat(
                [prompts["negative_pooled_prompt_embeds"], prompts["pooled_prompt_embeds"]]
            ),
            return_dict=False,
        )[0]
        u, c = out.chunk(2)
        return -(u + guidance * (c - u))

    shape = (1, 4, SIZE // 2, SIZE // 2)
    x = torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    )
    cache = None
    with torch.no_grad():
        for letter, a, b in zip(plan, levels, levels[1:], strict=False):
            if letter == "R":
                assert cache is not None
                d = run(refiner, x, a, cache) + cache
                later = run(refiner, x + (a - b) * d, b, cache) + d
            else:
                d = run(pipe.transformer, x, a) if letter == "H" or cache is None else cache
                later = run(pipe.transformer, x + (a - b) * d, b)
            x, cache = x + (a - b) / 2 * (d + later), d if letter == "R" else later
    return x


@pytest.mark.parametrize("plan", ["HHH", "HPPP", "HPPR", "HRHR"])
def test_plans_in_a_guided_pipeline_are_the_loop_over_its_modules(plan):
    pipe = sd3()
    refiner = refiner_of(pipe) if "R" in plan else None
    ft.accelerate(pipe, plan, refiner, grid="corrected")
    latents = call(pipe, guidance_scale=2.5)
    levels = [1 - t for t in pipe.scheduler._times]
    assert_close(latents, heun_by_hand(pipe, levels, plan, refiner), 2e-5)
    if refiner is not None:
        without = heun_by_hand(pipe, levels, plan.replace("R", "P"), refiner)
        assert relative_error(latents, without) > 1e-3


def test_a_refiner_beside_flux_reads_packed_latents_and_its_guidance():
    pipe = flux()
    refiner = refiner_of(pipe)
    ft.accelerate(pipe, ft.Plan.parse("H1R1"), refiner, grid="plan")
    latents = call(pipe, guidance_scale=3.0)
    conditioning = dict(
        encoder_hidden_states=embeds()["prompt_embeds"],
        pooled_projections=embeds()["pooled_prompt_embeds"],
        guidance=torch.full((2,), 3.0),
        txt_ids=torch.zeros(5, 3),
        img_ids=pipe._prepare_latent_image_ids(
            2, SIZE // 4, SIZE // 4, torch.device("cpu"), torch.float32
        ),
        return_dict=False,
    )

    def run(module: Any, x: Tensor, level: float) -> Tensor:
        return -module(hidden_states=x, timestep=torch.full((2,), level), **conditioning)[0]

    shape = (1, 4, SIZE // 2, SIZE // 2)
    x = packed(
        torch.cat(
            [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        )
    )
    with torch.no_grad():
        d = run(pipe.transformer, x, 1.0)
        later = run(pipe.transformer, x + 0.5 * d, 0.5)
        x, v = x + 0.25 * (d + later), later
        d = run(refiner, torch.cat([x, v], -1), 0.5) + v
        later = run(refiner, torch.cat([x + 0.5 * d, v], -1), 0.0) + d
        x = x + 0.25 * (d + later)
    assert_close(latents, x, 2e-5)


@pytest.mark.parametrize("kind", ["StableDiffusion3", "Flux"])
def test_image_to_image_enters_in_the_middle(kind):
    maker = sd3 if kind == "StableDiffusion3" else flux
    pipe = maker(f"{kind}Img2ImgPipeline")
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = dict(
        image=image, strength=0.5, **({} if maker is sd3 else dict(height=SIZE, width=SIZE))
    )
    stock = call(pipe, num_inference_steps=6, **options)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with ft.accelerated(pipe, "E6"):
        assert_close(call(pipe, num_inference_steps=6, **options), stock, 1e-6)
        assert len(calls) == 3
        # The number of steps that was asked for decides nothing: strength is a share of the plan's
        # calls.
        assert_close(call(pipe, num_inference_steps=40, **options), stock, 1e-6)
    calls.clear()
    with ft.accelerated(pipe, "H1P5"):
        assert call(pipe, num_inference_steps=6, **options).isfinite().all()
    assert len(calls) == 4  # of seven
    handle.remove()


def test_inpainting_leaves_the_outside_as_it_was():
    """The source's own latents, one draw of the encoder's posterior, whatever the plan and the
    mask.
    """
    pipe = sd3("StableDiffusion3InpaintPipeline", sd3_transformer(in_channels=16, out_channels=16))
    pipe.vae = pipelines.vae(16)
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    nothing, left = torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    left[..., : SIZE // 2] = 1
    options: dict[str, Any] = dict(image=image, strength=0.7, padding_mask_crop=None)
    source = call(pipe, mask_image=nothing, num_inference_steps=6, **options)
    half, latents = SIZE // 4, {}
    for plan in ("E6", "H1P5", "H2P2"):
        with ft.accelerated(pipe, plan):
            latents[plan] = call(pipe, mask_image=left, **options)
            assert call(pipe, mask_image=nothing, **options).equal(source)
        assert latents[plan][..., half:].equal(source[..., half:])
        assert relative_error(latents[plan][..., :half], source[..., :half]) > 0.1
    assert relative_error(latents["E6"], latents["H1P5"]) > 1e-3


def test_a_generator_for_each_image():
    pipe = sd3()
    with ft.accelerated(pipe, "H1P2"):
        both = call(pipe, guidance_scale=1.0)
        generator = [torch.Generator().manual_seed(1)]
        prompts = {name: value[1:] for name, value in embeds().items()}
        one = pipe(
            **prompts,
            generator=generator,
            guidance_scale=1.0,
            height=SIZE,
            width=SIZE,
            output_type="latent",
        ).images
    assert_close(one[0], both[1], 1e-5)


def test_callbacks_see_every_call_change_latents_and_interrupt():
    pipe = flux()
    seen = []

    def halve_once(
        pipe: Any, index: int, timestep: Any, kept: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        seen.append(float(timestep))
        return {"latents": kept["latents"] / 2} if index == 2 else kept

    with ft.accelerated(pipe, "E4"):
        changed = call(pipe, callback_on_step_end=halve_once, num_inference_steps=4)
    assert len(seen) == 4
    assert_close(changed, call(pipe, callback_on_step_end=halve_once, num_inference_steps=4), 1e-6)

    def stop(pipe: Any, index: int, timestep: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = index == 1
        seen.append(float(timestep))
        return kept

    seen.clear()
    with ft.accelerated(pipe, "H1P3"):
        call(pipe, callback_on_step_end=stop)
        assert len(seen) == 2
        # The run that was cut short leaves nothing behind.
        assert call(pipe).equal(call(pipe))


def test_threads_share_a_pipeline():
    """Stock schedulers fail here."""
    pipe = sd3()
    ft.accelerate(pipe, "H1P2R1", refiner_of(pipe))
    expected = [call(pipe, seed=10 * i) for i in range(3)]
    barrier, latents, errors = (
        threading.Barrier(3),
        dict[int, list[Tensor]](),
        list[BaseException](),
    )

    def work(number: int) -> None:
        try:
            barrier.wait()
            latents[number] = [call(pipe, seed=10 * number) for _ in range(4)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, results in latents.items():
        for result in results:
            assert_close(result, expected[number], 1e-6)
    assert len(latents) == 3


def test_summary_tells_plan_calls_and_milliseconds():
    pipe = sd3()
    ft.accelerate(pipe, "H1P3R2", refiner_of(pipe))
    assert "0 predictor calls so far" in ft.summary(pipe)
    call(pipe)
    call(pipe)
    text = ft.summary(pipe)
    assert "plan H1P3R2: 5 predictor and 4 refiner calls a run" in text
    assert "10 predictor calls so far, " in text
    assert " ms each" in text
    ft.restore(pipe)


@pytest.mark.parametrize(
    "transformer",
    [
        sd3_transformer,
        flux_transformer,
        lambda: sd3_transformer(dual_attention_layers=(0,), qk_norm="rms_norm"),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_fused_adaln_is_the_networks_own(transformer, dtype, bound):
    network = transformer().to(dtype)
    pipe = (sd3 if "SD3" in type(network).__name__ else flux)(transformer=network)
    prompts = {
        name: value.to(dtype)
        for name, value in (
            embeds() | (negative() if "SD3" in type(network).__name__ else {})
        ).items()
    }
    options = dict(num_inference_steps=3, height=SIZE, width=SIZE, output_type="latent")

    def made() -> Tensor:
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(**prompts, generator=generator, **options).images

    plain = made()
    changed = [
        module
        for module in network.modules()
        if type(module).__name__ in ("AdaLayerNormZero", "AdaLayerNormContinuous")
    ]
    ft.accelerate(pipe, "E3", graph=True)
    patched = [module for module in changed if "forward" in vars(module)]
    assert len(patched) == len(changed) > 1
    assert_close(made(), plain, bound)
    # A LoRA changes the layer whose product is made: it is still the layer's own.
    patched[0].linear.register_forward_hook(lambda module, given, result: 2 * result)
    with_lora = made()
    assert relative_error(with_lora, plain) > 1e-4
    ft.restore(pipe)
    assert_close(made(), with_lora, bound)


def test_calls_of_the_transformer_are_captured_by_their_shapes_and_kept_within_bounds():
    pipe = sd3()
    expected = [call(pipe, seed=seed, num_inference_steps=3) for seed in range(2)]
    ft.accelerate(pipe, "E3", graph=True)
    captures = vars(pipe)[MARK].captures
    captures.recorder, captures.limit = Fake(), 2
    for seed in (0, 1, 0):
        assert_close(call(pipe, seed=seed), expected[seed], 1e-5)
    assert captures.recorder.recorded == 1
    assert captures.recorder.replayed >= 6
    assert "captured for 4 rows" in ft.summary(pipe)
    for scale in (1.0, 7.0):  # without guidance two rows
        call(pipe, guidance_scale=scale)
        call(pipe, guidance_scale=scale)
    for height in (SIZE, SIZE // 2):
        prompts = embeds() | negative()
        for _ in range(2):
            pipe(**prompts, height=height, width=SIZE, output_type="latent")
    assert len(captures.report()) == 2
    ft.restore(pipe)
    assert captures.report() == []
    assert call(pipe, num_inference_steps=3).equal(expected[0])


def test_captures_and_a_refiner_together():
    pipe = flux()
    refiner = refiner_of(pipe)
    with ft.accelerated(pipe, "H1P1R1", refiner):
        expected = [call(pipe, seed=seed) for seed in range(3)]
    ft.accelerate(pipe, "H1P1R1", refiner, graph=True)
    captures = vars(pipe)[MARK].captures
    captures.recorder = Fake()
    for seed in range(3):
        assert_close(call(pipe, seed=seed), expected[seed], 1e-5)
    assert captures.recorder.replayed >= 6
