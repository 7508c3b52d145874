"""The public FlowTurbo code's own results on seeded checkpoints, and an independent reading of the
method.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from close import assert_close, relative_error
from oracle import run
from paths import ROOT
from safetensors.torch import save_file

import flowturbo as ft

GOLDENS = np.load(ROOT / "tests" / "goldens" / "goldens.npz")


def write(state, path: Path, wrapper: str | None) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if wrapper is None else {wrapper: state, "opt": {"lr": 1e-4}}, path)
    return path


@pytest.mark.parametrize(
    "suffix, wrapper", [(".pt", None), (".pth", "model"), (".pt", "ema"), (".safetensors", None)]
)
@pytest.mark.parametrize(
    "name, config, counts, guidance", recipe.CASES, ids=[case[0] for case in recipe.CASES]
)
def test_the_public_codes_results(name, config, counts, guidance, suffix, wrapper, tmp_path):
    predictor, refiner = (
        write(state, tmp_path / f"{role}{suffix}", wrapper)
        for role, state in zip(("predictor", "refiner"), recipe.checkpoints(config), strict=True)
    )
    heads = recipe.CONFIGS[config]["heads"]
    model = ft.load(predictor, refiner, heads=heads, device="cpu")
    noise, labels = recipe.inputs(config)
    plan = "".join(f"{letter}{count}" for letter, count in zip("HPR", counts, strict=True) if count)
    latents = ft.sample(model, plan, labels, guidance=guidance, noise=noise)
    # 5e-7 is what is measured; a LayerNorm eps of 1e-5 would pass at 1e-5 and not at 2e-6.
    assert_close(latents, torch.from_numpy(GOLDENS[name]), 2e-6)


@pytest.mark.parametrize("config", recipe.CONFIGS)
@pytest.mark.parametrize(
    "plan, counts, depth", [("H1P5R3", (1, 5, 3), 28), ("H8P9R5", (8, 9, 5), 4)]
)
@pytest.mark.parametrize("channels", [3, 4])
def test_an_independent_reading_of_the_method(config, plan, counts, depth, channels, tmp_path):
    states = recipe.checkpoints(config, depth)
    heads = recipe.CONFIGS[config]["heads"]
    files = [write(sd, tmp_path / f"{i}.pt", None) for i, sd in enumerate(states)]
    noise, labels = recipe.inputs(config)
    wide = [{name: weight.double() for name, weight in sd.items()} for sd in states]
    truth = run(counts, *wide, heads, noise.double(), labels, 1.5, channels)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = ft.load(*files, heads=heads, device="cpu", dtype=dtype)
        latents = ft.sample(
            model, plan, labels, guidance=1.5, guidance_channels=channels, noise=noise.to(dtype)
        )
        assert_close(latents, truth, bound)


def test_the_goldens_tell_guidance_on_three_channels_from_guidance_on_all(tmp_path):
    model = ft.load(
        *[
            write(sd, tmp_path / f"{i}.pt", None)
            for i, sd in enumerate(recipe.checkpoints("head_dim_24"))
        ],
        heads=4,
        device="cpu",
    )
    noise, labels = recipe.inputs("head_dim_24")
    other = ft.sample(model, "H1R2", labels, guidance=2.0, guidance_channels=4, noise=noise)
    assert relative_error(other, torch.from_numpy(GOLDENS["h1r2"])) > 0.01
