"""Refiners of Qwen-Image, Z-Image, FLUX.2 Klein and Wan 2.2, from captioned images to plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import complete_newer
import numpy as np
import pytest
import torch
from close import assert_close
from newer_pipelines import FRAMES
from PIL import Image
from pipelines import SIZE

import flowturbo as ft
from flowturbo.data.encode import Encode, encode
from flowturbo.data.prompt_latents import load_prompts
from flowturbo.models.pipelines import load_pipeline, network_with_prompts
from flowturbo.models.text_to_image import PromptNetwork
from flowturbo.runtime.rng import StepRandom
from flowturbo.training.objectives import Refinement
from flowturbo.training.train import Distill, distill

KINDS = ("qwen", "zimage", pytest.param("klein", marks=pytest.mark.slow), "wan22")
CAPTIONS = ["a cat", "two dogs", "", "snow, snow"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of each kind, and captioned images."""
    root = tmp_path_factory.mktemp("newer")
    rng = np.random.default_rng(0)
    (root / "captioned").mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = rng.integers(0, 256, (SIZE + 7, SIZE + 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "captioned" / f"{i}.png")
        (root / "captioned" / f"{i}.txt").write_text(caption)
    made: dict[str, Path] = {}

    def folder(kind: str) -> tuple[Path, Path]:
        """Of a pipeline, and of its shards."""
        if kind not in made:
            complete_newer.saved(kind, root)
            made[kind] = encode(
                Encode(
                    source=root / "captioned", out=root / f"{kind}-data", model=str(root / kind),
                    image_size=SIZE, batch_size=3, shard_size=3, dtype="float32", device="cpu",
                )
            )  # fmt: skip
        return root / kind, made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_prompts_of_one_shape_and_what_the_pipeline_makes_of_images(kind, folders):
    pipeline, shards = folders(kind)
    data = load_prompts(shards)
    latents, prompts = data.batch(np.arange(4), StepRandom(1, 0, range(4)))
    frames = {"frames": 1} if kind == "wan22" else {}
    model = ft.from_pipeline(pipeline, image_size=SIZE, device="cpu", **frames)
    assert data.shape == model.latent_shape == tuple(latents.shape[1:])
    encoded = model.encode(CAPTIONS)
    assert isinstance(prompts, dict)
    if "lengths" in encoded:
        assert prompts["embeds"].shape[:2] == (4, 512)
        assert prompts["lengths"].tolist() == encoded["lengths"].tolist()
        assert prompts["lengths"].dtype == torch.int64
    length = encoded["embeds"].shape[1]
    assert_close(prompts["embeds"][:, :length], encoded["embeds"], 1e-5)
    assert prompts["embeds"][:, length:].eq(0).all()
    assert_close(data.null["embeds"][0], prompts["embeds"][2], 1e-5)  # its caption is empty
    # Prompts from the shards are those of texts.
    noise = ft.noise(model.latent_shape, 0, range(4))
    texts = ft.sample(model, "E1", CAPTIONS, noise=noise)
    assert_close(ft.sample(model, "E1", prompts, noise=noise), texts, 1e-5)


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [("qwen", (2.0, 4.0)), ("zimage", (2.0, 4.0)), ("wan22", (1.0, 1.0)), ("wan22", (2.0, 4.0))],
)
def test_the_objective_is_the_formula(kind, guidance, folders):
    """Row by row and by hand, as for SD3 and FLUX."""
    pipeline, shards = folders(kind)
    data = load_prompts(shards)
    teacher = network_with_prompts(load_pipeline(pipeline, ("network",))).requires_grad_(False)
    student_module: Any = ft.refiner_for(teacher.module)
    for parameter in student_module.parameters():
        parameter.data.normal_(0, 0.05)
    student = PromptNetwork(student_module.requires_grad_(False))
    rows, delta_max, drop = 4, 0.3, 0.5
    latents, prompts = data.batch(np.arange(rows), StepRandom(1, 0, range(rows)))
    objective = Refinement(
        teacher, data.null, data.shape[0], label_drop=drop, delta_max=delta_max, guidance=guidance
    )
    loss = objective(student, latents, prompts, StepRandom(2, 0, range(rows)))
    draws = StepRandom(2, 0, range(rows))
    x0, t, dropped = draws.normal(latents.shape[1:]), draws.uniform(), draws.uniform() < drop
    delta = delta_max * float(draws.shared.random())
    scale = guidance[0] + (guidance[1] - guidance[0]) * draws.uniform()
    total = torch.zeros(())
    assert isinstance(prompts, dict)
    for i in range(rows):
        mine = {name: value[i : i + 1] for name, value in prompts.items()}
        x, time = t[i] * latents[i : i + 1] + (1 - t[i]) * x0[i : i + 1], t[i : i + 1]
        v = teacher(x, time, mine)
        if guidance[1] > 1:
            u = teacher(x, time, data.null)
            v = u + scale[i] * (v - u)
        x, seen = x + delta * v, data.null if dropped[i] else mine
        target = teacher(x, time + delta, seen)
        total += (student(x, time + delta, seen, v) + v - target).square().mean() / rows
    assert_close(loss, total, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refiner_is_trained_and_runs_in_plans(kind, folders, tmp_path):
    pipeline, shards = folders(kind)
    distill(
        Distill(
            out=tmp_path, teacher=str(pipeline), data=str(shards), steps=3, batch_size=2, lr=1e-2,
            ema=0.5, save_every=3, log_every=1, device="cpu",
        )
    )  # fmt: skip
    frames = {"frames": FRAMES} if kind == "wan22" else {}
    model = ft.from_pipeline(pipeline, tmp_path, image_size=SIZE, device="cpu", **frames)
    refined, plain = (
        ft.sample(model, plan, ["a cat"], guidance=2.0, seed=1) for plan in ("H1R1", "H1P1")
    )
    assert refined.isfinite().all()
    assert not torch.allclose(refined, plain)
