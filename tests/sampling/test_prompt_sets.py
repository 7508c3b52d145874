"""Large sets of a text-to-image model's images: as `sample` makes them, through kills, each of its
own prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from tiny import tiny_model
from torch import nn

import flowturbo as ft
import flowturbo.sampling.generate as module
from flowturbo.cli.main import main
from flowturbo.models.text_to_image import PromptModel
from flowturbo.runtime import rng
from flowturbo.sampling.generate import generate
from flowturbo.storage.image_shards import verify

CAPTIONS = ["a red fox", "a harbour at dawn", "snow, and nothing else", "x", "a red fox"]
SIZE = {"sd3": None, "2rf": None, "flux": 32}


@pytest.fixture(scope="module")
def models(pipeline_folders: dict[str, Path]) -> dict[str, PromptModel]:
    return {
        kind: ft.from_pipeline(
            pipeline_folders[kind],
            convention="2-rf" if kind == "2rf" else "auto",
            image_size=SIZE[kind],
            device="cpu",
        )
        for kind in SIZE
    }


def made(model: PromptModel, out: Path, prompts: list[str] = CAPTIONS, **changes: object) -> dict:
    options = dict(guidance=2.0, seed=3, batch_size=2, shard_size=2)
    return generate(model, "H1", prompts, out, **{**options, **changes})


def arrays(out: Path) -> dict[str, np.ndarray]:
    shards = [np.load(path) for path in sorted(out.glob("images-*.npz"))]
    return {
        name: np.concatenate([shard[name] for shard in shards])
        for name in ("arr_0", "labels", "indices")
    }


@pytest.mark.parametrize("kind", SIZE)
def test_images_are_those_of_sample_each_with_its_prompt(
    kind: str, models: dict[str, PromptModel], tmp_path: Path
) -> None:
    model = models[kind]
    manifest = made(model, tmp_path)
    stored = arrays(tmp_path)
    assert stored["labels"].tolist() == CAPTIONS
    assert stored["indices"].tolist() == list(range(5))
    for first in (0, 2, 4):  # as they are made, batch by batch
        numbers = range(first, min(first + 2, 5))
        captions = [CAPTIONS[i] for i in numbers]
        noise = rng.noise(model.latent_shape, 3, numbers)
        images = ft.sample(
            model, "H1", captions, noise=noise, guidance=2.0, batch_size=2, output="uint8"
        )
        assert np.array_equal(stored["arr_0"][first : first + 2], images.numpy())
    assert not np.array_equal(stored["arr_0"][0], stored["arr_0"][4])  # one prompt, two images
    assert verify(tmp_path) == manifest
    encoders = manifest["settings"]["text_encoders"]
    assert (
        len([name for name in encoders if name.startswith("tokenizer")])
        == {"2rf": 1, "sd3": 2, "flux": 2}[kind]
    )
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_kill_loses_nothing_and_other_prompts_are_refused(
    models: dict[str, PromptModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = models["sd3"], tmp_path / "killed"
    whole = made(model, tmp_path / "whole", negative="blurry")
    saved = []

    class Killed(BaseException):
        pass

    def save_shard(*shard: object, real=module.save_shard) -> None:
        if saved:
            raise Killed
        saved.append(shard)
        real(*shard)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_shard", save_shard)
        with pytest.raises(Killed):
            made(model, out, negative="blurry")
    assert len(list(out.glob("images-*.npz"))) == 1
    for changes, said in (
        (dict(prompts=[*CAPTIONS[:4], "a dog"]), "labels was"),
        (dict(negative="ugly"), "negative was 'blurry' and is now 'ugly'"),
        (dict(negative=None), "negative was 'blurry' and is now None"),
    ):
        with pytest.raises(ValueError, match=said):
            made(model, out, **{"negative": "blurry", **changes})
    assert made(model, out, negative="blurry") == whole
    made(model, tmp_path / "without")
    assert not np.array_equal(arrays(tmp_path / "without")["arr_0"], arrays(out)["arr_0"])


def test_a_set_knows_its_networks_and_its_text_encoders(
    models: dict[str, PromptModel], tmp_path: Path
) -> None:
    model = models["sd3"]
    made(model, tmp_path)
    (tmp_path / "images-00001-of-00003.npz").unlink()
    for name, network in (
        ("predictor", model.predictor),
        ("text_encoders.text_encoder_2", model.pipe.text_encoder_2),
        ("vae", model.pipe.vae),
    ):
        assert isinstance(network, nn.Module)
        weight = next(network.parameters())
        with torch.no_grad():
            before = weight.clone()
            weight.add_(1)
            try:
                with pytest.raises(ValueError, match=f"{name} was"):
                    made(model, tmp_path)
            finally:
                weight.copy_(before)
    made(model, tmp_path)


def test_what_does_not_fit_is_refused_before_a_folder_is_there(
    models: dict[str, PromptModel], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    with pytest.raises(ValueError, match="prompts must be at least one text"):
        made(models["sd3"], out, [3, 4])
    with pytest.raises(ValueError, match="prompts must be at least one text"):
        made(models["sd3"], out, [])
    with pytest.raises(
        ValueError,
        match=(
            "prompts given as text need a model that was made from a pipeline with its text "
            "encoders"
        ),
    ):
        made(dataclasses.replace(models["sd3"], pipe=None), out)
    with pytest.raises(
        ValueError, match="negative is for text-to-image models that are guided by it"
    ):
        made(models["flux"], out, negative="blurry")
    with pytest.raises(
        ValueError, match="negative is for text-to-image models that are guided by it"
    ):
        generate(tiny_model(), "H1", [1, 2], out, negative="blurry")
    with pytest.raises(TypeError, match="negative must be one text, got int"):
        made(models["sd3"], out, negative=3)
    assert not out.exists()


def test_the_command_reads_a_prompt_a_line(
    pipeline_folders: dict[str, Path],
    models: dict[str, PromptModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    captions, out = tmp_path / "captions.txt", tmp_path / "coco"
    captions.write_text("\n".join(CAPTIONS[:3]) + "\n")
    words = [
        "sample",
        "--model",
        str(pipeline_folders["sd3"]),
        "--plan",
        "H1",
        "--device",
        "cpu",
        "--guidance",
        "2",
    ]
    words += ["--prompts-file", str(captions), "--seed", "3"]
    folder = [*words, "--num", "5", "--batch-size", "2", "--shard-size", "2", "--out", str(out)]
    assert main(folder) == 0
    repeated = [CAPTIONS[i % 3] for i in range(5)]
    manifest = made(models["sd3"], tmp_path / "set", repeated)
    assert arrays(out)["labels"].tolist() == repeated
    said = (
        "coco: 5 images by H1 (2 predictor and 0 refiner calls), complete in 3 "
        "shards, images_sha256 "
    )
    assert said + manifest["images_sha256"] in capsys.readouterr().out
    assert verify(out)["about"] == {
        "model": "sd3", "refiner": None, "vae": None, "label_rule": "cycle",
        "labels": "captions.txt",
    }  # fmt: skip
    assert main(["verify", str(out), "--npz", str(tmp_path / "all.npz")]) == 0
    with np.load(tmp_path / "all.npz", allow_pickle=False) as joined:
        assert joined["labels"].tolist() == repeated
        assert hashlib.sha256(joined["arr_0"].tobytes()).hexdigest() == manifest["images_sha256"]
    assert main([*words, "--out", str(tmp_path / "one.npz")]) == 0
    with np.load(tmp_path / "one.npz", allow_pickle=False) as one:
        assert one["labels"].tolist() == CAPTIONS[:3]
    capsys.readouterr()
    for text, said in (
        ("a\n\nb\n", f"line 2 of {captions} is empty"),
        ("", f"line 1 of {captions} is empty"),
    ):
        captions.write_text(text)
        assert main(folder) == 2
        assert said in capsys.readouterr().err
    captions.write_bytes(b"caf\xe9\n")
    assert main(folder) == 2
    assert "can't be read as text" in capsys.readouterr().err
    assert main([*folder, "--prompts", "a"]) == 2
    assert "give prompts or prompts_file, not both" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_what_one_makes(
    pipeline_folders: dict[str, Path], models: dict[str, PromptModel], tmp_path: Path
) -> None:
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "flowturbo",
        "sample",
    ]
    words += [
        "--model",
        str(pipeline_folders["sd3"]),
        "--plan",
        "H1",
        "--device",
        "cpu",
        "--guidance",
        "2",
        "--seed",
        "3",
    ]
    words += [
        "--prompts",
        *CAPTIONS,
        "--batch-size",
        "2",
        "--shard-size",
        "2",
        "--out",
        str(tmp_path / "two"),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run(
        [sys.executable, *words], env=environment, check=True, timeout=300, capture_output=True
    )
    one, two = made(models["sd3"], tmp_path / "one"), verify(tmp_path / "two")
    assert {**two, "about": {}} == one
