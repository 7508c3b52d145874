"""The command line: what a person types, what is written, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flowturbo as ft
from flowturbo.cli.main import COMMANDS, main
from flowturbo.cli.output import labelled_grid


def test_sample_without_arguments_writes_a_labelled_grid_of_all_classes(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["sample"]) == 0
    assert "samples.png: 42 images by B7" in capsys.readouterr().out
    picture = np.asarray(Image.open("samples.png"))
    model = ft.load("emoji")
    assert {"smiley", "heart", "cat", "clock-3d"} <= set(model.class_names)
    images = ft.sample(model, "B7", range(42), guidance=model.guidance, seed=0, output="uint8")
    expected = np.asarray(labelled_grid(images, model.class_names))
    assert np.array_equal(picture, expected)
    assert len(np.unique(images)) == 256
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_npz_holds_the_images_of_the_library(tmp_path):
    out = tmp_path / "set.npz"
    assert (
        main(
            [
                "sample",
                "--model",
                "digits",
                "--out",
                str(out),
                "--plan",
                "H1R1",
                "--num",
                "13",
                "--batch-size",
                "4",
                "--seed",
                "5",
            ]
        )
        == 0
    )
    labels = [i % 10 for i in range(13)]
    images = ft.sample(
        ft.load("digits"), "H1R1", labels, guidance=1.5, seed=5, batch_size=4, output="uint8"
    )
    with np.load(out, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], images.numpy())
        assert arrays["labels"].tolist() == labels


def test_flags_reach_the_plan(tmp_path):
    out = tmp_path / "a.npz"
    flags = (
        "--plan E2 --grid 0 0.25 1 --labels 3 4 --cfg-scale 2 --guidance-interval 0.1 0.9 "
        "--guidance-channels 1"
    )
    assert main(["sample", "--model", "digits", "--out", str(out), *flags.split()]) == 0
    plan = ft.Plan.parse("E2", grid=(0, 0.25, 1), guidance_interval=(0.1, 0.9))
    expected = ft.sample(
        ft.load("digits"), plan, [3, 4], guidance=2.0, guidance_channels=1, seed=0, output="uint8"
    )
    with np.load(out, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], expected.numpy())


@pytest.mark.parametrize(
    "words, said",
    [
        (["sample", "--plan", "R3"], "R needs the velocity of an earlier step"),
        (["sample", "--plan", "H1x3"], "plan must look like 'H1P5R3'"),
        (["sample", "--labels", "3", "42"], "labels must be from 0 to 41, got 42"),
        (["sample", "--out", "picture.gif"], "out must end in .png or .npz, got 'picture.gif'"),
        (["sample", "--num", "0"], "num must be at least 1, got 0"),
        (["sample", "--model", "nowhere.pt"], "nowhere.pt does not exist"),
        (["sample", "--model", "imagenet"], "neither a bundled model"),
        (["sample", "--guidance", "nan"], "guidance must be finite, got nan"),
        (["convert", "nowhere.pt", "a.safetensors"], "nowhere.pt does not exist"),
        (["convert", "nowhere.pt", "a.pt"], "target must end in .safetensors"),
        (["train", "--out", "run", "--model", "SiT-Z/3"], "got 'SiT-Z/3'"),
    ],
)
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing(
    words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("flowturbo: error: ")
    assert said in error or said in " ".join(error.split()), error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises((ValueError, TypeError)):
        main([*words, "--debug"])


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["sample", "--plam", "H1"])
    assert exit.value.code == 2
    assert "--plam" in capsys.readouterr().err


def test_convert_keeps_what_the_model_does(tmp_path):
    source = Path(ft.__file__).parent / "bundled" / "digits.safetensors"
    target = tmp_path / "copy.safetensors"
    assert main(["convert", str(source), str(target), "--dtype", "float32"]) == 0
    a, b = (ft.sample(ft.load(path), "E2", [1, 2], seed=0) for path in (source, target))
    assert a.equal(b)


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_every_command_explains_itself(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 0
    said = capsys.readouterr().out
    for expected in COMMANDS if words == ["--help"] else [words[0]]:
        assert expected in said


def test_info_names_versions_and_every_operation():
    shown = subprocess.run(
        [sys.executable, "-m", "flowturbo", "info"], capture_output=True, text=True, check=True
    ).stdout
    from flowturbo_kernels import OPS

    for word in ("torch", "triton", "quack", "FlashAttention-4", "CUDA extension:", *OPS):
        assert word in shown
