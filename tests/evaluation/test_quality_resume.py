"""An evaluation resumes with the same settings, and refuses others."""

import math
import sys
from dataclasses import replace

import pytest
from quality_runs import DIGITS, NAMES, Killed, kill_at, read, settings
from tiny import CONFIG, random_sit

import flowturbo.evaluation.quality as module
from flowturbo.evaluation.quality import evaluate
from flowturbo.evaluation.velocity import InspectVelocity, inspect_velocity
from flowturbo.models.checkpoint import save_sit


def test_killed_evaluation_goes_on(models, measured, tmp_path, monkeypatch, no_plot):
    seen = kill_at(monkeypatch, "E2")
    with pytest.raises(Killed):
        evaluate(settings(models, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"quality.json", "fine.safetensors"}
    half = read(tmp_path)
    assert [row["plan"] for row in half["rows"]] == ["H1R1"]

    seen[:] = ["E2", "E2"]  # past the kill
    evaluate(settings(models, tmp_path))
    assert (
        seen[2:] == ["E2"] * 3 + ["H20"] * 3
    )  # neither the fine solution nor the finished plan again
    whole = read(tmp_path)
    assert whole["rows"][0] == half["rows"][0]
    assert {path.name for path in tmp_path.iterdir()} == NAMES
    without_time = [
        [{k: v for k, v in row.items() if k != "ms_per_image"} for row in results["rows"]]
        for results in (whole, read(measured))
    ]
    assert without_time[0] == without_time[1]
    assert {k: v for k, v in whole.items() if k != "rows"} == {
        k: v for k, v in read(measured).items() if k != "rows"
    }


def test_kill_in_the_fine_solution_leaves_nothing(models, tmp_path, monkeypatch, no_plot):
    kill_at(monkeypatch, "H20")
    monkeypatch.setattr(module, "save_tensors", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        evaluate(settings(models, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_plans_may_be_added(models, tmp_path, monkeypatch, no_plot):
    quick = dict(reference_plan="H2")
    evaluate(settings(models, tmp_path, plans=("E2",), **quick))
    first = read(tmp_path)["rows"]
    seen = kill_at(monkeypatch, "none")
    evaluate(settings(models, tmp_path, plans=("E1", "E2"), **quick))
    assert seen == ["E1"] * 3
    rows = read(tmp_path)["rows"]
    assert [row["plan"] for row in rows] == ["E2", "E1"]
    assert rows[0] == first[0]
    (tmp_path / "quality.md").unlink()
    evaluate(
        settings(models, tmp_path, plans=("E2",), **quick)
    )  # nothing left to measure: the reports alone
    assert seen == ["E1"] * 3
    assert read(tmp_path)["rows"] == rows
    assert "| E1 |" in (tmp_path / "quality.md").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(guidance=2.0), r"settings.guidance was 1.5 and is now 2.0"),
        (dict(seed=1), r"settings.seed was 0 and is now 1"),
        (dict(images=30), r"settings.images was 25 and is now 30"),
        (dict(refiner=None, plans=("E2",)), r"settings.refiner was '.* and is now None"),
    ],
)
def test_other_settings_are_refused(measured, models, changes, message):
    before = {path.name: path.read_bytes() for path in measured.iterdir()}
    with pytest.raises(ValueError, match=message) as refused:
        evaluate(settings(models, measured, **changes))
    assert "choose another folder as out" in str(refused.value)
    assert {path.name: path.read_bytes() for path in measured.iterdir()} == before


def test_another_model_under_the_same_name_is_refused(models, tmp_path, no_plot):
    path = tmp_path / "predictor.safetensors"
    path.write_bytes(models[0].read_bytes())
    these = settings((path, models[1]), tmp_path / "out", plans=("E1",), reference_plan="H1")
    evaluate(these)
    save_sit(path, random_sit(DIGITS, 3))
    with pytest.raises(ValueError, match=r"model\.predictor_sha256 was"):
        evaluate(these)
    (these.out / "quality.json").unlink()
    with pytest.raises(ValueError, match=r"fine\.safetensors was made with other settings"):
        evaluate(these)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99, "settings": {}, "model": {}, "environment": {}}']
)
def test_foreign_results_are_refused(models, tmp_path, text):
    (tmp_path / "quality.json").write_text(text)
    with pytest.raises(ValueError, match=r"quality\.json holds no results of an evaluation"):
        evaluate(settings(models, tmp_path))
    assert (tmp_path / "quality.json").read_text() == text


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(images=0), "images must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(images=39, batch_size=20), r"images must be at least 2 \* batch_size = 40 .* got 39"),
        (dict(reference_images=26), "reference_images must be from 20 to images = 25, got 26"),
        (dict(reference_images=19), "reference_images must be from 20 to images = 25, got 19"),
        (dict(classifier_steps=0), "classifier_steps must be at least 1"),
        (dict(guidance=math.nan), "guidance must be finite"),
        (dict(seed=-1), "seed must be from 0"),
        (dict(plans=()), "plans must be a list of at least one plan"),
        (dict(plans="E2"), "plans must be a list of at least one plan, got 'E2'"),
        (dict(plans=("E2", "Q3")), "letters of"),
        (dict(plans=("E2", "E1E1")), "plans must differ, but 'E2' and 'E1E1' are the same"),
        (dict(plans=("R1",)), "R needs the velocity of an earlier step"),
        (dict(reference_plan="H1R1"), "reference_plan must do without the refiner, got 'H1R1'"),
    ],
)
def test_bad_settings_are_refused(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(models, tmp_path, **changes)


def test_models_that_do_not_fit_are_refused(models, tmp_path):
    save_sit(tmp_path / "four.safetensors", random_sit(CONFIG, 0))
    save_sit(tmp_path / "five.safetensors", random_sit(replace(DIGITS, num_classes=5), 0))
    out = tmp_path / "out"
    for name, got in (
        ("four", r"latents \(4, 8, 8\) of 10 classes"),
        ("five", r"latents \(1, 8, 8\) of 5 classes"),
    ):
        with pytest.raises(
            ValueError, match=rf"model must have latents \(1, 8, 8\) of 10 classes.*got {got}"
        ):
            evaluate(
                settings((tmp_path / f"{name}.safetensors", None), out, refiner=None, plans=("E1",))
            )
    with pytest.raises(ValueError, match="refiner must be given: of the plans, H1R1 need one"):
        evaluate(settings(models, out, refiner=None))
    assert not out.exists()


def test_missing_matplotlib_is_said_at_the_door(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"pip install 'flowturbo\[eval\]'"):
        evaluate(settings(models, out))
    with pytest.raises(ValueError, match=r"pip install 'flowturbo\[eval\]'"):
        inspect_velocity(InspectVelocity(out=out, model=str(models[0])))
    assert not out.exists()
