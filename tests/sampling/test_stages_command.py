"""Plans with stages on the command line, and in large sets of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.runtime import rng
from flowturbo.sampling.generate import generate

PLAN = "A2 at 1/2 + E1 from 0.6"
CAPTIONS = ["a red fox", "a harbour at dawn", "x"]


@pytest.fixture(scope="module")
def model(pipeline_folders: dict[str, Path]) -> ft.PromptModel:
    return ft.from_pipeline(pipeline_folders["sd3"], device="cpu")


def command(folder: Path, out: Path, *more: str) -> list[str]:
    words = ["sample", "--model", str(folder), "--device", "cpu", "--guidance", "2", "--seed", "3"]
    return [*words, "--prompts", *CAPTIONS, "--out", str(out), *more]


@pytest.mark.parametrize("enlarge", ["latents", "pixels"])
def test_the_command_makes_the_images_of_sample(model, pipeline_folders, tmp_path, capsys, enlarge):
    ft.StagedPlan.parse(PLAN).save(tmp_path / "stages.json")
    options: Any = dict(guidance=2.0, seed=3, output="uint8", enlarge=enlarge)
    expected = ft.sample(model, PLAN, CAPTIONS, **options).numpy()
    for plan in (PLAN, str(tmp_path / "stages.json")):
        out = tmp_path / "images.npz"
        words = command(pipeline_folders["sd3"], out, "--plan", plan, "--enlarge", enlarge)
        assert main(words) == 0
        assert np.array_equal(np.load(out)["arr_0"], expected)
    said = f"by {PLAN} (3 predictor and 0 refiner calls, priced as 1.5 at full size)"
    assert said in capsys.readouterr().out


def status(words: list[str]) -> object:
    """With which a command ends; words that can't be parsed end it by themselves."""
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample", "--plan", "A2 at 1/2 + E1"], "stage 2 must say from which noise level below 1"),
        (["sample", "--plan", "A2 at 1/2 | E1"], "after a plan come from, to or +, got '|'"),
        (
            ["sample", "--plan", PLAN, "--shift", "3"],
            "a plan with stages holds its grid and guidance interval: leave out grid, shift",
        ),
        (
            ["sample", "--model", "digits", "--plan", PLAN],
            "has stages, which need a model of any size",
        ),
        (["edit", "x.png", "--labels", "3", "--plan", PLAN], "has stages: sample, compile and"),
        (["inpaint", "x.png", "--labels", "3", "--plan", PLAN], "has stages: sample, compile and"),
        (["bench", "--plans", PLAN], "has stages: sample, compile and sample_stages take such"),
        (["tune", "--out", "x", "--rivals", PLAN], "has stages: sample, compile and sample_stages"),
    ],
)
def test_commands_that_refuse(capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_set_is_made_by_stages_and_resumed(model, tmp_path):
    options: Any = dict(guidance=2.0, seed=3, batch_size=2, shard_size=2)
    manifest = generate(model, PLAN, CAPTIONS, tmp_path, **options)
    settings = manifest["settings"]
    assert settings["plan"] == PLAN
    assert settings["sizes"] == [[8, 8], [16, 16]]
    assert [len(grid) for grid in settings["grid"]] == [3, 2]
    shards = sorted(tmp_path.glob("images-*.npz"))
    stored = np.concatenate([np.load(path)["arr_0"] for path in shards])
    for first in (0, 2):
        numbers = range(first, min(first + 2, 3))
        images = ft.sample(
            model,
            PLAN,
            CAPTIONS[first : first + 2],
            noise=rng.noise(model.latent_shape, 3, numbers),
            guidance=2.0,
            batch_size=2,
            output="uint8",
        )
        assert np.array_equal(stored[first : first + 2], images.numpy())
    shards[0].unlink()
    assert generate(model, PLAN, CAPTIONS, tmp_path, **options) == manifest
    for change in (dict(enlarge="pixels"), dict(plan="A2 at 1/2 + E1 from 0.5")):
        arguments = {"plan": PLAN, "labels": CAPTIONS, "out": tmp_path, **options, **change}
        with pytest.raises(ValueError, match=r"was .* and is now"):
            generate(model, **arguments)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
