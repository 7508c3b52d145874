"""Models from pipelines of Qwen-Image, Z-Image, FLUX.2 and Wan: as the stock pipelines."""

from __future__ import annotations

from typing import Any

import pytest
from close import assert_close, relative_error
from newer_pipelines import FRAMES, KINDS, as_ours, call, conditions, newer, noise_for
from pipelines import SIZE

import flowturbo as ft


def model_from(kind: str, pipe: Any, **options: Any) -> ft.PromptModel:
    frames = {"frames": FRAMES} if kind.startswith("wan") else {}
    return ft.from_pipeline(pipe, image_size=SIZE, **frames, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_e_plans_make_the_latents_of_the_pipeline(kind, guidance):
    pipe = newer(kind)
    model = model_from(kind, pipe)
    noise = noise_for(pipe, model)
    expected = as_ours(kind, pipe, call(kind, pipe, guidance, noise, num_inference_steps=8))
    grid = [1 - level for level in pipe.scheduler.sigmas.tolist()]
    c = conditions(kind)
    latents = ft.sample(model, ft.Plan.parse("E8", grid=grid), c, guidance=guidance, noise=noise)
    assert_close(latents, expected, 2e-6)
    if guidance != 1:
        other = ft.sample(model, ft.Plan.parse("E8", grid=grid), c, noise=noise)
        assert relative_error(other, expected) > 1e-3
