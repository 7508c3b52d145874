"""Evaluations on a training set: what is timed, whose classes they are, how rows are told apart."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from class_runs_small import (
    COUNTS,
    HELD,
    THREE,
    class_settings,
    drawn,
)
from named_model import contents
from quality_runs import read
from tiny import random_sit

import flowturbo as ft
import flowturbo.evaluation.class_quality as module
from flowturbo.evaluation.quality import evaluate
from flowturbo.evaluation.references import read_pictures
from flowturbo.models.checkpoint import save_sit

pytestmark = pytest.mark.usefixtures("no_class_plot")


def test_time_is_that_of_sampling(networks, sets, tmp_path, monkeypatch):
    """Drawing noise takes longer on the CPU than a few calls on a GPU."""
    clock = [0.0]

    def taking(seconds, function):
        def timed(*args, **options):
            clock[0] += seconds
            return function(*args, **options)

        return timed

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(module.rng, "noise", taking(100, ft.noise))
    monkeypatch.setattr(module, "sample", taking(1, ft.sample))
    evaluate(class_settings(networks, sets, tmp_path, plans=("E1",), held_out=None))
    assert read(tmp_path)["rows"][0]["ms_per_image"] == 1000 / 20


def test_plans_are_compared_in_the_precision_that_the_folder_was_begun_with(
    networks, sets, tmp_path
):
    these = class_settings(networks, sets, tmp_path, plans=("E2",), held_out=None)
    for precisions in (("bfloat16",), ("float32", "fp8"), ()):
        evaluate(replace(these, precisions=precisions))
    rows = read(tmp_path)["rows"]
    assert [(row["label"], row["precision"]) for row in rows] == [
        *(("E2", "bfloat16"), ("E2 float32", "float32"), ("E2 fp8", "fp8")),
    ]
    assert read(tmp_path)["precision"] == "bfloat16"
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "bfloat16 where nothing else is said" in text
    assert "less that of the same plan in bfloat16." in text


def test_plans_may_be_added_to_the_model(networks, sets, tmp_path):
    """Those that a search found, when other plans were measured before."""
    predictor = tmp_path / "model.safetensors"
    predictor.write_bytes(networks[0].read_bytes())
    these = class_settings((predictor, networks[1]), sets, tmp_path / "out", held_out=None)
    evaluate(these)
    save_sit(
        predictor, random_sit(THREE, 0), plans=contents(tmp_path, {"fast": ft.Plan.parse("A2")})
    )
    evaluate(replace(these, plans=("E2", "H1R1", "fast")))
    assert [row["plan"] for row in read(these.out)["rows"]] == ["E2", "H1R1", "fast"]


def test_another_plan_of_the_same_name_has_another_label(networks, sets, tmp_path, monkeypatch):
    """A file that is fitted again, and measured in the same folder."""
    path, labels = tmp_path / "mine.json", []
    for time in (0.3, 0.4, 0.3):
        ft.Plan.parse("A2", grid=(0, time, 1)).save(path)
        scales = (1.0,) if not labels else (1.0, 2.0)
        evaluate(
            class_settings(
                networks,
                sets,
                tmp_path / "out",
                plans=(str(path),),
                guidance=scales,
                held_out=None,
                reference_plan="E2",
            )
        )
        labels = [
            (row["label"], row["record"]["grid"][1]) for row in read(tmp_path / "out")["rows"]
        ]
    other = labels[1][0]
    assert re.fullmatch(r"mine\.json [0-9a-f]{6}", other)
    assert labels == [("mine.json", 0.3), (other, 0.4), (other, 0.4), ("mine.json", 0.3)]


def test_plans_that_are_the_same_with_an_interval_are_refused(networks, sets, tmp_path):
    path = tmp_path / "mine.json"
    ft.Plan.parse("E2", guidance_interval=(0.1, 0.45)).save(path)
    settings = class_settings(
        networks,
        sets,
        tmp_path / "out",
        plans=("E2", str(path)),
        guidance=(1.0, 2.0),
        guidance_intervals=((0.0, 1.0), (0.1, 0.45)),
    )
    with pytest.raises(ValueError, match=r"differ, but 'E2 \[0.1-0.45\]' and 'mine.json' are"):
        evaluate(settings)
    assert not (tmp_path / "out").exists()


def test_classes_of_other_names_are_refused(networks, sets, tmp_path):
    """The same number of another class would be measured without an error."""
    path, names = tmp_path / "named.safetensors", ("cat", "dog", "1st")
    save_sit(path, random_sit(THREE, 0), class_names=names)
    train, held = drawn(0, COUNTS), drawn(1, HELD)
    right = tmp_path / "right.npz", tmp_path / "wrong.npz", tmp_path / "numbers.npz"
    for file, data, found in zip(
        right, (train, held, held), (names, ("cat", "1st", "dog"), ("2", "1", "0")), strict=True
    ):
        np.savez(file, latents=data.mean, labels=data.labels, class_names=np.array(found))
    model, unnamed = ft.load(path, device="cpu"), ft.load(networks[0], device="cpu")

    def settings(data, held_out):
        return class_settings(networks, (str(data), held_out and str(held_out)), tmp_path / "out")

    with pytest.raises(ValueError, match="data must have the classes of the model, where class 1"):
        read_pictures(settings(right[1], None), model)
    with pytest.raises(
        ValueError, match=r"held_out must have the classes of data, .* 'dog', got '1"
    ):
        read_pictures(settings(*right[:2]), unnamed)
    for which in (model, unnamed):
        assert len(read_pictures(settings(right[0], right[2]), which)[1]) == 30
    assert len(read_pictures(settings(right[0], sets[1]), model)[0]) == 60
