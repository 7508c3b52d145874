"""Commands with a model whose file names its classes and holds plans and a guidance scale."""

from __future__ import annotations

import json
from pathlib import Path

import named_model
import numpy as np
import pytest
from named_model import GUIDANCE, NAMES, PLANS, contents, pictures
from PIL import Image
from tiny import random_sit

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.cli.output import labelled_grid
from flowturbo.evaluation.fid import _samples
from flowturbo.evaluation.fid_settings import Fidelity
from flowturbo.evaluation.latency import Bench, bench
from flowturbo.evaluation.quality import Evaluate
from flowturbo.evaluation.velocity import InspectVelocity
from flowturbo.models.checkpoint import save_sit
from flowturbo.tuning.settings import Tune

OPTIONS = dict(seed=0, output="uint8")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return named_model.write(tmp_path_factory.mktemp("named") / "m.safetensors")


@pytest.fixture(scope="module")
def model(file) -> ft.FlowModel:
    return ft.load(file, device="cpu")


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def refused(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flowturbo: error: ")
    assert "Traceback" not in error
    return error


def test_names_and_numbers_are_labels_and_the_grid_has_names(tmp_path, file, model):
    picture, arrays = tmp_path / "a.png", tmp_path / "a.npz"
    words = ["sample", "--model", file, "--labels", "smiley", "heart", "cat", 4, "hot dog"]
    run(*words, "--out", picture)
    run(*words, "--out", arrays)
    numbers = [0, 2, 3, 4, 5]
    images = ft.sample(model, PLANS["default"], numbers, guidance=GUIDANCE, **OPTIONS)
    expected = labelled_grid(images, [NAMES[k] for k in numbers])
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))
    with np.load(arrays, allow_pickle=False) as held:
        assert np.array_equal(held["arr_0"], images.numpy())
        assert held["labels"].tolist() == numbers
        assert held["labels"].dtype == np.int64
        assert held["class_names"].tolist() == list(NAMES)


def test_a_single_named_image_has_its_name_below(tmp_path, file, model):
    run("sample", "--model", file, "--labels", "cat", "--out", tmp_path / "a.png")
    images = ft.sample(model, "default", ["cat"], guidance=GUIDANCE, **OPTIONS)
    expected = np.asarray(labelled_grid(images, ["cat"]))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)


def test_a_class_may_be_called_none(tmp_path):
    """Which the command line would take for no labels, and so for all of them."""
    path = named_model.write(tmp_path / "m.safetensors", class_names=("None", *NAMES[1:]))
    run("sample", "--model", path, "--labels", "None", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as held:
        assert held["labels"].tolist() == [0]


def test_without_names_the_file_has_none(tmp_path):
    run("sample", "--model", "digits", "--labels", 3, "--plan", "E1", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as held:
        assert sorted(held) == ["arr_0", "labels"]


def test_a_folder_has_the_named_classes(tmp_path, file, model):
    run(
        *["sample", "--model", file, "--labels", "cat", "heart", "--num", 3],
        *["--plan", "fast", "--batch-size", 3, "--out", tmp_path / "set"],
    )
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["class_names"] == list(NAMES)
    assert manifest["settings"]["guidance"] == GUIDANCE
    images = ft.sample(model, "fast", ["cat", "heart", "cat"], guidance=GUIDANCE, **OPTIONS)
    assert np.array_equal(pictures(tmp_path / "set" / "images-00000-of-00001.npz"), images.numpy())


def test_images_are_edited_and_inpainted_towards_names(tmp_path, file, model):
    source, out = tmp_path / "source.npz", tmp_path / "out.npz"
    run("sample", "--model", file, "--labels", 0, 1, "--out", source)
    images = pictures(source)
    run("edit", source, "--model", file, "--labels", "cat", 2, "--out", out)
    options = dict(seed=0, guidance=GUIDANCE)
    expected = ft.edit(model, PLANS["default"], images, [3, 2], **options)
    assert np.array_equal(pictures(out), expected.numpy())
    with np.load(out) as held:
        assert held["labels"].tolist() == [3, 2]
        assert held["class_names"].tolist() == list(NAMES)
    run(
        *["inpaint", source, "--model", file, "--labels", "heart", "--plan", "fast"],
        *["--box", 0, 0, 0.5, 1, "--guidance", 3, "--out", out],
    )
    mask = np.zeros((8, 8), bool)
    mask[:, :4] = True
    expected = ft.inpaint(model, PLANS["fast"], images, mask, "heart", seed=0, guidance=3.0)
    assert np.array_equal(pictures(out), expected.numpy())


def test_unknown_names_are_answered_with_near_ones(tmp_path, file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "sample", "--model", file, "--labels", "hart", 1)
    assert "got 'hart'; names near it are 'heart'" in said
    Image.new("RGB", (8, 8)).save("a.png")
    said = refused(capsys, "edit", "a.png", "--model", file, "--labels", "smily")
    assert "got 'smily'; names near it are 'smiley', 'smiley-3d'" in said
    said = refused(capsys, "sample", "--model", "digits", "--labels", "seven")
    assert "the model's classes have no names, got 'seven'" in said
    said = refused(capsys, "sample", "--model", file, "--labels", "cat", 6)
    assert "labels must be from 0 to 5, got 6" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", [None, *PLANS])
def test_a_plan_by_name_is_the_plan_and_the_summary_has_its_calls(
    tmp_path, file, model, name, capsys
):
    out = tmp_path / "a.npz"
    words = ["sample", "--model", file, "--num", 6, "--out", out]
    run(*words, *(["--plan", name] if name else []))
    plan = PLANS[name or "default"]
    expected = ft.sample(model, plan, range(6), guidance=GUIDANCE, **OPTIONS)
    assert np.array_equal(pictures(out), expected.numpy())
    assert f"6 images by {plan} ({plan.cost.predictor} predictor" in capsys.readouterr().out


def test_an_unknown_plan_is_refused_before_the_model_is_loaded(file, tmp_path, capsys):
    damaged = tmp_path / "m.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    for command in (["sample"], ["edit", file, "--labels", "cat"]):
        said = refused(capsys, *command, "--model", damaged, "--plan", "fats")
        assert "plan must look like 'H1P5R3'" in said
        assert "fast (E2, 2 calls)" in said
    assert "is damaged" in refused(capsys, "sample", "--model", damaged, "--plan", "fast")


@pytest.mark.parametrize(
    "flags", [["--shift", 3], ["--guidance-interval", 0.2, 0.8], ["--grid", 0, 0.2, 0.4, 1]]
)
@pytest.mark.parametrize("plan", [[], ["--plan", "default"]])
def test_a_plan_by_name_holds_its_grid_and_interval(file, flags, plan, tmp_path, capsys):
    words = ["sample", "--model", file, "--out", tmp_path / "a.npz", *flags]
    said = refused(capsys, *words, *plan)
    assert "the model's plan 'default' holds its grid and guidance interval" in said
    assert not (tmp_path / "a.npz").exists()
    run(*words, "--plan", "E3")


def write(folder, plans, **changes):
    return named_model.write(
        folder / "m.safetensors", plans=contents(folder, plans), guidance=None, **changes
    )


@pytest.mark.parametrize("default", ["E1R2", "A4 at 1/2 + A3 from 0.6"])
def test_a_default_that_the_command_cannot_run_is_not_taken(tmp_path, default):
    """The refiner is another file, and pictures are edited without stages."""
    parse = ft.StagedPlan.parse if "+" in default else ft.Plan.parse
    path = write(tmp_path, {"default": parse(default)})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    out = tmp_path / "out.npz"
    run("edit", tmp_path / "a.png", "--model", path, "--labels", "cat", "--out", out)
    black = np.zeros((1, 8, 8, 3), np.uint8)
    expected = ft.edit(ft.load(path, device="cpu"), "B7", black, 3, guidance=1.5, seed=0)
    assert np.array_equal(pictures(out), expected.numpy())


def test_a_default_with_refiner_steps_is_taken_where_the_refiner_is(tmp_path):
    path, refiner = write(tmp_path, {"default": ft.Plan.parse("E1R2")}), tmp_path / "r.safetensors"
    save_sit(refiner, random_sit(named_model.CONFIG_OF_NAMED.refiner(), 1))
    out = tmp_path / "out.npz"
    run("sample", "--model", path, "--refiner", refiner, "--labels", "cat", "--out", out)
    both = ft.load(path, refiner, device="cpu")
    expected = ft.sample(both, "E1R2", [3], guidance=1.5, **OPTIONS)
    assert np.array_equal(pictures(out), expected.numpy())


def test_a_plan_that_the_refiners_file_names_is_taken(tmp_path):
    path, refiner = write(tmp_path, {"fast": ft.Plan.parse("E2")}), tmp_path / "r.safetensors"
    plans = contents(tmp_path, {"fast": ft.Plan.parse("E1R2")})
    save_sit(refiner, random_sit(named_model.CONFIG_OF_NAMED.refiner(), 1), plans=plans)
    flags = ["--model", path, "--refiner", refiner, "--labels", "cat", "--out", tmp_path / "o.npz"]
    run("sample", *flags, "--plan", "fast")
    expected = ft.sample(ft.load(path, refiner, device="cpu"), "E1R2", [3], guidance=1.5, **OPTIONS)
    assert np.array_equal(pictures(tmp_path / "o.npz"), expected.numpy())


def test_convert_writes_names_plans_and_guidance(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_sit("plain.safetensors", random_sit(named_model.CONFIG_OF_NAMED, 0), vae="pixels")
    Path("names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8-sig")
    for name, plan in zip("abc", PLANS.values(), strict=True):
        plan.save(f"{name}.json")
    plans = [f"{name}={letter}.json" for name, letter in zip(PLANS, "abc", strict=True)]
    words = ["convert", "plain.safetensors"]
    named = ["--class-names", "names.txt", "--plans", *plans, "--guidance", GUIDANCE]
    named += ["--license", "CC0-1.0 AND MIT"]
    run(*words, "m.safetensors", *named)
    model = ft.load("m.safetensors", device="cpu")
    assert (model.class_names, model.plans, model.guidance) == (NAMES, PLANS, GUIDANCE)
    run("info", "--model", "m.safetensors")
    assert "\nlicence: CC0-1.0 AND MIT\n" in capsys.readouterr().out
    before = sorted(tmp_path.iterdir())
    for flags, message in (
        (["--plans", "fast"], "plans must look like 'fast=fast.json', got 'fast'"),
        (["--plans", "fast=E2"], "plans must look like 'fast=fast.json', got 'fast=E2'"),
        (["--plans", "A4=a.json"], "names that are no plans themselves, got 'A4'"),
        (["--plans", "x=a.json", "x=b.json"], "plans must have different names, got 'x' twice"),
        (["--plans", "x=nowhere.json"], "nowhere.json can't be read"),
        (["--plans", "=a.json"], "plans must have names of one line"),
        (["--class-names", "nowhere.txt"], "class_names nowhere.txt can't be read as text"),
        (["--class-names", "a.json"], "class_names must be"),
        (["--guidance", "nan"], "guidance must be finite"),
    ):
        assert message in refused(capsys, *words, "n.safetensors", *flags)
    assert sorted(tmp_path.iterdir()) == before


def test_info_lists_classes_and_plans(file, capsys, tmp_path):
    run("info", "--model", file)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{file}: 6 classes, latents of 1 x 8 x 8, no refiner",
        "guidance: 2.25, as its file recommends",
        "plans:",
        "  best, so far: E1L2, 3 calls",
        "  default: A3, 3 calls",
        "  fast: E2, 2 calls",
        "classes:",
        *(f"     {number}  {name}" for number, name in enumerate(NAMES)),
    ]
    run("info", "--model", "digits")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "digits: 10 classes, latents of 1 x 8 x 8, a refiner"
    assert said[-1] == "classes: 0 to 9, without names"
    assert "nowhere.pt does not exist" in refused(capsys, "info", "--model", "nowhere.pt")
    assert "must be a model of classes" in refused(capsys, "info", "--model", "org/pipeline")


def test_calls_of_the_refiner_are_told_apart(tmp_path, capsys):
    run("info", "--model", write(tmp_path, {"two": ft.Plan.parse("E1R2")}))
    assert "  two: E1R2, 1 predictor and 4 refiner calls" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, name",
    [
        (lambda file, plan: Bench(model=file, plans=(plan, "E1")), "plans"),
        (lambda file, plan: Fidelity(model=file, plans=(plan,), metrics=("is",)), "plans"),
        (lambda file, plan: Tune(model=file, rivals=("E3", plan)), "rivals"),
    ],
    ids=["bench", "fid", "tune"],
)
def test_other_commands_take_plans_by_name(tmp_path, file, settings, name):
    assert "best, so far" in getattr(settings(str(file), "best, so far"), name)
    for model, plan in ((file, "fats"), ("digits", "fast")):
        with pytest.raises(ValueError, match="plan must look like 'H1P5R3'"):
            settings(str(model), plan)
    staged = write(tmp_path, {"two": ft.StagedPlan.parse("A4 at 1/2 + A3 from 0.6")})
    with pytest.raises(ValueError, match="has stages"):
        settings(str(staged), "two")


def test_a_benchmark_and_a_score_are_of_the_named_plan(file, model):
    rows = bench(Bench(model=str(file), plans=("fast",), batch_sizes=(1,), repeats=1, device="cpu"))
    assert "| fast | 1 |" in rows
    samples = Fidelity(model=str(file), plans=("fast", "best, so far"), metrics=("is",), images=4)
    sets = _samples(samples, model)
    assert list(sets) == ["E2", PLANS["best, so far"].name]
    assert [generated.plan for generated in sets.values()] == [PLANS["fast"], PLANS["best, so far"]]


@pytest.mark.parametrize("settings", [Tune, Bench, Evaluate, InspectVelocity, Fidelity])
def test_commands_that_measure_take_the_scale_that_the_file_recommends(tmp_path, settings):
    path = named_model.write(tmp_path / "m.safetensors")
    images = (
        dict(metrics=("fid",), reference="a.npz", plans=("E1",)) if settings is Fidelity else {}
    )
    given = settings(model=str(path), **images)
    asked = settings(model=str(path), guidance=3.0, **images)
    if settings is Evaluate:
        assert (given.guidance, asked.guidance) == ((GUIDANCE,), (3.0,))
    else:
        assert (given.guidance, given.scale, asked.scale) == (GUIDANCE, GUIDANCE, 3.0)
    with pytest.raises(ValueError, match="guidance must be finite"):
        settings(model=str(path), guidance=float("nan"), **images)
