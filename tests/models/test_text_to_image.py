"""Text-to-image models in our convention: 2-RF, SD3 and FLUX, with their guidance and shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from fake_recorder import Fake
from pipelines import (
    SIZE,
    call,
    diffusers,
    embeds,
    flux,
    negative,
    sd3,
)
from prompt_models import KINDS, NETWORKS, conditioning, model_of, noise_of
from torch import Tensor

import flowturbo as ft
from flowturbo.models.text_to_image import PromptNetwork, packed, unpacked


def by_hand(
    kind: str,
    module: Any,
    x: Tensor,
    t: float,
    c: dict[str, Tensor],
    v: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The velocity, data - noise, that each kind's own code makes of its network, one half at a
    time.
    """
    level, N = 1 - t, len(x)
    input = x if v is None else torch.cat([x, v], 1)
    if kind == "2rf":
        return module(
            input, torch.full((N,), 1000 * level), encoder_hidden_states=c["embeds"]
        ).sample
    if kind == "sd3":
        out = module(input, c["embeds"], c["pooled"], torch.full((N,), 1000 * level)).sample
        return -out
    _, _, H, W = x.shape
    pipe = diffusers.FluxPipeline
    ids = pipe._prepare_latent_image_ids(N, H // 2, W // 2, torch.device("cpu"), torch.float32)
    tokens = pipe._pack_latents(input, N, input.shape[1], H, W)
    scale = torch.full((N,), guidance) if module.config.guidance_embeds else None
    zeros = torch.zeros(c["embeds"].shape[1], 3)
    out = module(
        tokens, c["embeds"], c["pooled"], torch.full((N,), level), ids, zeros, scale
    ).sample
    return -pipe._unpack_latents(out, 8 * H, 8 * W, 8)


def loop(
    kind: str,
    model: Any,
    plan: str,
    grid: list[float],
    x: Tensor,
    c: dict[str, Tensor],
    guidance: float,
) -> Tensor:
    """E, H, P and R over the modules, guided by two calls in turn where the kind has halves."""
    halves = kind != "flux" and guidance != 1

    def run(module: Any, x: Tensor, t: float, v: Tensor | None = None) -> Tensor:
        output = by_hand(
            kind, module, x, t, {k: c[k] for k in c if "negative" not in k}, v, guidance
        )
        if not halves:
            return output
        u = by_hand(
            kind, module, x, t, {k.removeprefix("negative_"): c[k] for k in c if "negative" in k}, v
        )
        return u + guidance * (output - u)

    cache: Any = None
    predictor, refiner = model.predictor.module, model.refiner and model.refiner.module
    for letter, a, b in zip(plan, grid, grid[1:], strict=False):
        h = b - a
        if letter == "E":
            x, cache = x + h * run(predictor, x, a), None
            continue
        if letter == "R":
            d = cache + run(refiner, x, a, cache)
            later = d + run(refiner, x + h * d, b, cache)
        else:
            d = run(predictor, x, a) if letter == "H" or cache is None else cache
            later = run(predictor, x + h * d, b)
        x, cache = x + h / 2 * (d + later), d if letter == "R" else later
    return x


def test_packing_is_diffusers_own():
    x = torch.randn(2, 3, 8, 12)
    tokens = packed(x)
    assert tokens.equal(diffusers.FluxPipeline._pack_latents(x, 2, 3, 8, 12))
    assert unpacked(tokens, 8, 12).equal(x)


@pytest.mark.parametrize("kind", KINDS)
def test_time_and_sign_are_ours(kind):
    """Rows at different times; what the kind's own code makes of it is `by_hand`."""
    module = NETWORKS[kind]()
    network = PromptNetwork(module)
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([0.15, 0.8]), conditioning(kind)
    c = {name: value for name, value in c.items() if "negative" not in name}
    more = {"embedded_guidance": torch.full((2,), 2.5)} if kind == "flux" else {}
    velocity = network(x, t, {**c, **more})
    for i in range(2):
        mine = {name: value[i : i + 1] for name, value in c.items()}
        assert_close(
            velocity[i : i + 1],
            by_hand(kind, module, x[i : i + 1], float(t[i]), mine, guidance=2.5),
            1e-5,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plan", "guidance"), [("EEE", 1.0), ("HPP", 3.0), ("HPR", 2.0), ("HRPR", 1.0)]
)
def test_plans_are_loops_over_the_modules(kind, plan, guidance):
    model = model_of(kind, refined="R" in plan)
    grid = [0.0, 0.2, 0.55, 0.8, 1.0] if len(plan) == 4 else [0.0, 0.3, 0.7, 1.0]
    x, c = noise_of(model), conditioning(kind)
    latents = ft.sample(model, ft.Plan.parse(plan, grid=grid), c, guidance=guidance, noise=x)
    with torch.no_grad():
        expected = loop(kind, model, plan, grid, x, c, guidance)
        assert_close(latents, expected, 2e-5)
        if "R" in plan:
            assert (
                relative_error(
                    loop(kind, model, plan.replace("R", "P"), grid, x, c, guidance), expected
                )
                > 1e-3
            )


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_e_plans_make_the_latents_of_the_pipeline(kind):
    """On the noise levels that its scheduler took, which a plan takes as its grid."""
    pipe = sd3() if kind == "sd3" else flux()
    expected = call(pipe, num_inference_steps=5, guidance_scale=3.0)
    grid = [1 - level for level in pipe.scheduler.sigmas.tolist()]
    model = ft.from_pipeline(pipe, image_size=SIZE)
    shape = (1, *model.latent_shape)
    noise = torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    )
    c = {
        k.replace("prompt_embeds", "embeds").replace("pooled_embeds", "pooled"): v
        for k, v in (embeds() | negative()).items()
    }
    latents = ft.sample(model, ft.Plan.parse("E5", grid=grid), c, guidance=3.0, noise=noise)
    assert_close(latents, unpacked(expected, *shape[2:]) if kind == "flux" else expected, 1e-5)


def test_plans_as_text_run_on_the_models_own_shift():
    model = model_of("sd3")
    assert model.shift == 3.0
    x, c = noise_of(model), conditioning("sd3")
    own = ft.sample(model, "H1P2", c, noise=x)
    assert own.equal(ft.sample(model, ft.Plan.parse("H1P2", shift=3.0), c, noise=x))
    assert relative_error(ft.sample(model, ft.Plan.parse("H1P2"), c, noise=x), own) > 1e-3
    assert model_of("2rf").shift == 1.0


@pytest.mark.parametrize(("size", "tokens"), [(SIZE, 64), (2 * SIZE, 256)])
def test_the_shift_of_flux_is_that_of_its_pipeline(size, tokens):
    pipe = flux()
    call(pipe, num_inference_steps=4, height=size, width=size)
    model = ft.from_pipeline(pipe, image_size=size)
    linear = np.linspace(1, 0.25, 4)
    levels = [*(model.shift * linear / (1 + (model.shift - 1) * linear)), 0]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(levels, abs=1e-6)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    assert model.shift == pytest.approx(np.exp(mu))


def calls_of(model: ft.PromptModel) -> list[int]:
    """Rows of each call of the predictor, as they come."""
    rows: list[int] = []
    module: Any = model.predictor
    module.module.register_forward_pre_hook(
        lambda _, args, told: rows.append(len(told["hidden_states"])), with_kwargs=True
    )
    return rows


def test_guidance_is_each_models_own():
    halves = model_of("sd3")
    rows, c, x = calls_of(halves), conditioning("sd3"), noise_of(halves)
    guided = ft.sample(halves, "E2", c, guidance=3.0, noise=x)
    assert rows == [4, 4]
    other = {name: value for name, value in conditioning("sd3", 5).items() if "negative" in name}
    assert (
        relative_error(ft.sample(halves, "E2", {**c, **other}, guidance=3.0, noise=x), guided)
        > 1e-3
    )
    embedded = model_of("flux")
    rows, c = calls_of(embedded), conditioning("flux")
    low, high = (ft.sample(embedded, "E2", c, guidance=g, noise=x) for g in (1.0, 4.0))
    assert rows == [2, 2, 2, 2]
    assert relative_error(low, high) > 1e-3
    none = model_of("flux", guidance_embeds=False)
    assert ft.sample(none, "E2", c, noise=x).isfinite().all()
    with pytest.raises(ValueError, match="guidance must be 1 for this model"):
        ft.sample(none, "E2", c, guidance=2.0, noise=x)


def test_batches_are_parts_of_the_whole():
    model, c = model_of("sd3"), conditioning("sd3", count=5)
    whole = ft.sample(model, "H1P1", c, guidance=2.0, seed=4)
    assert_close(ft.sample(model, "H1P1", c, guidance=2.0, seed=4, batch_size=2), whole, 1e-5)
    alone = ft.sample(
        model,
        "H1P1",
        {k: v[3:4] for k, v in c.items()},
        guidance=2.0,
        noise=ft.noise(model.latent_shape, 4, [3]),
    )
    assert_close(alone, whole[3:4], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_captured_and_replayed_for_other_prompts(kind):
    model = model_of(kind, refined=True)
    runs = [(conditioning(kind, seed), 1.5 + seed, seed) for seed in range(3)]
    expected = [ft.sample(model, "H1P1R1", c, guidance=g, seed=seed) for c, g, seed in runs]
    model.captures.recorder = Fake()
    for _ in range(2):
        for (c, g, seed), result in zip(runs, expected, strict=True):
            assert_close(ft.sample(model, "H1P1R1", c, guidance=g, seed=seed), result, 1e-5)
    assert (model.captures.recorder.recorded, model.captures.recorder.replayed >= 4) == (1, True)
    longer = {k: torch.cat([v, v], 1) if "pooled" not in k else v for k, v in runs[0][0].items()}
    ft.sample(model, "H1P1R1", longer, guidance=2.0)
    model.captures.clear()
    ft.compile(model, "H1P1R1", 2, prompts={k: v[:1] for k, v in longer.items()})
    assert model.captures.recorder.recorded == 2
    before = model.captures.recorder.replayed
    ft.sample(model, "H1P1R1", longer, guidance=2.0)
    assert model.captures.recorder.replayed == before + 1
