"""Labels by the names of classes, and plans by the names in a model's file: what is sampled is what
numbers and plans give, to the bit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import named_model
import numpy as np
import pytest
import torch
from named_model import NAMES, PLANS
from tiny import random_sit, tiny_model

import flowturbo as ft
from flowturbo.models.checkpoint import save_sit
from flowturbo.models.class_names import numbered
from flowturbo.sampling.generate import MARK, generate
from flowturbo.storage.files import load_arrays
from flowturbo.storage.image_shards import join, verify

BY_NAME = ["cat", "smiley-3d", "hot dog", "cat"]
NUMBERS = [3, 1, 5, 3]
OPTIONS: dict[str, Any] = dict(guidance=1.5, seed=4, output="uint8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ft.FlowModel:
    return ft.load(named_model.write(tmp_path_factory.mktemp("m") / "m.safetensors"), device="cpu")


@pytest.mark.parametrize(
    "labels",
    [
        BY_NAME,
        tuple(BY_NAME),
        ["cat", 1, "hot dog", np.int64(3)],
        [np.str_(name) for name in BY_NAME],
        np.array(BY_NAME),
        np.array(["cat", 1, 5, "cat"], dtype=object),
        np.array(BY_NAME, dtype=np.dtypes.StringDType()),
    ],
    ids=["list", "tuple", "mixed", "numpy's texts", "array", "objects", "string array"],
)
def test_names_in_any_container_are_the_numbers(model: ft.FlowModel, labels: Any) -> None:
    expected = ft.sample(model, "E2", NUMBERS, **OPTIONS)
    assert ft.sample(model, "E2", labels, **OPTIONS).equal(expected)


def test_one_name_is_one_image(model: ft.FlowModel) -> None:
    for one in ("cat", np.array("cat")):
        images = ft.sample(model, "E2", one, **OPTIONS)
        assert images.equal(ft.sample(model, "E2", [3], **OPTIONS))
    other = ft.sample(model, "E2", "heart", **OPTIONS)
    assert not images.equal(other)


def test_images_are_edited_towards_names(model: ft.FlowModel) -> None:
    images = ft.sample(model, "E2", [0] * 4, **OPTIONS)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6] = True
    for how in (
        lambda labels: ft.edit(model, "E2", images, labels, guidance=1.5, seed=1),
        lambda labels: ft.inpaint(model, "E2", images, mask, labels, guidance=1.5, seed=1),
    ):
        assert how(BY_NAME).equal(how(NUMBERS))
        assert how("cat").equal(how(3))
        assert not how("cat").equal(how(1))


@pytest.mark.parametrize(
    "label, near",
    [
        ("smily", "names near it are 'smiley', 'smiley-3d'; "),
        ("face", "names near it are 'animal-face'; "),
        ("CAT", "names near it are 'cat'; "),
        ("black cat", "names near it are 'cat'; "),
        ("dog", "names near it are 'hot dog'; "),
        ("qqq", "got 'qqq'; model.class_names has all 6"),
        ("", "got ''; model.class_names has all 6"),
        ("3", "got '3'; model.class_names has all 6"),
        ("cycle", "got 'cycle'"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(
    model: ft.FlowModel, label: str, near: str
) -> None:
    with pytest.raises(ValueError, match=f"labels must be names or numbers.*, got {label!r}") as e:
        ft.sample(model, "E2", ["cat", label], seed=0)
    assert near in str(e.value)
    assert "`flowturbo info --model FILE`" in str(e.value)


def test_names_that_differ_in_case_are_different_and_near() -> None:
    names = ("Cat", "cat", "CAT")
    assert numbered(["cat", "CAT", "Cat"], names) == [1, 2, 0]
    with pytest.raises(ValueError, match="names near it are 'Cat', 'cat', 'CAT'"):
        numbered("cAt", names)


def test_many_near_names_are_cut() -> None:
    with pytest.raises(ValueError, match=r"near it are ('dog [a-h]'(, )?){5}; model"):
        numbered("dog", [f"dog {letter}" for letter in "abcdefgh"])


def test_models_without_names_take_none() -> None:
    with pytest.raises(TypeError, match="the model's classes have no names, got 'cat'"):
        ft.sample(tiny_model(), "E2", [1, "cat"], seed=0)
    with pytest.raises(TypeError, match="the model's classes have no names, got '3'"):
        ft.sample(tiny_model(), "E2", "3", seed=0)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_by_name_is_the_plan(model: ft.FlowModel, name: str) -> None:
    plan, images = PLANS[name], ft.sample(model, "E2", [0] * 4, **OPTIONS)
    mask = torch.ones(8, 8, dtype=torch.bool)
    for how in (
        lambda p: ft.sample(model, p, NUMBERS, **OPTIONS),
        lambda p: ft.edit(model, p, images, NUMBERS, guidance=1.5, seed=1),
        lambda p: ft.inpaint(model, p, images, mask, NUMBERS, guidance=1.5, seed=1, strength=0.9),
    ):
        assert how(name).equal(how(plan))
        assert not how(name).equal(how("A6"))
    assert ft.compile(model, [name, "E1"], 2) == []  # on the CPU it runs once and captures nothing


def test_an_unknown_plan_is_answered_with_the_models_own(model: ft.FlowModel) -> None:
    for how in (
        lambda p: ft.sample(model, p, NUMBERS, **OPTIONS),
        lambda p: ft.compile(model, p),
        lambda p: generate(model, p, NUMBERS, "never-written"),
    ):
        with pytest.raises(ValueError, match="plan must look like 'H1P5R3'") as error:
            how("fats")
        assert (
            "The model has plans of its own: best, so far (E1L2, 3 calls), default (A3, 3 calls), "
            "fast (E2, 2 calls)" in str(error.value)
        )
    assert not Path("never-written").exists()
    with pytest.raises(ValueError, match="R needs the velocity") as error:
        ft.sample(model, "R3", NUMBERS)
    assert "plans of its own" not in str(error.value)
    with pytest.raises(ValueError, match=r"nowhere\.json can't be read") as error:
        ft.sample(model, "nowhere.json", NUMBERS)
    assert "plans of its own" not in str(error.value)


def test_a_plan_with_stages_is_sampled_only_where_stages_are(tmp_path: Path) -> None:
    plans = {"two": ft.StagedPlan.parse("A4 at 1/2 + A3 from 0.6")}
    path = named_model.write(
        tmp_path / "m.safetensors", plans=named_model.contents(tmp_path, plans)
    )
    model = ft.load(path, device="cpu")
    assert model.find_plan("two") == plans["two"]
    with pytest.raises(ValueError, match="has stages"):
        ft.edit(model, "two", torch.zeros(1, 1, 8, 8), 0)


def test_a_plan_with_stages_is_found_by_name_at_the_sizes_of_the_model(tmp_path: Path) -> None:
    plan = ft.StagedPlan.parse("A2 at 1/2 + A1 from 0.6")
    config = replace(named_model.CONFIG_OF_NAMED, sides=(4,))
    save_sit(
        tmp_path / "m.safetensors",
        random_sit(config, 0),
        vae="pixels",
        plans=named_model.contents(tmp_path, {"two": plan}),
    )
    model = ft.load(tmp_path / "m.safetensors", device="cpu")
    images = ft.sample(model, "two", NUMBERS, **OPTIONS)
    assert images.equal(ft.sample(model, plan, NUMBERS, **OPTIONS))
    assert not images.equal(ft.sample(model, "A3", NUMBERS, **OPTIONS))
    smaller = model.resized(4)
    assert smaller.plans == model.plans


def test_a_set_of_named_classes_keeps_both_meanings(model: ft.FlowModel, tmp_path: Path) -> None:
    labels = [NAMES[i % 6] for i in range(7)]
    options: dict[str, Any] = dict(guidance=1.5, seed=3, batch_size=2, shard_size=4)
    manifest = generate(model, "fast", labels, tmp_path / "set", **options)
    assert manifest["class_names"] == list(NAMES)
    assert verify(tmp_path / "set") == manifest
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["settings"]["plan"] == str(
        PLANS["fast"]
    )
    expected = ft.sample(
        model, "fast", [i % 6 for i in range(7)], **{**OPTIONS, "seed": 3}, batch_size=2
    ).numpy()
    for shard, rows in (("00000", slice(0, 4)), ("00001", slice(4, 7))):
        arrays, _ = load_arrays(tmp_path / "set" / f"images-{shard}-of-00002.npz")
        assert sorted(arrays) == ["arr_0", "class_names", "indices", "labels"]
        assert np.array_equal(arrays["arr_0"], expected[rows])
        assert arrays["labels"].dtype == np.int64
        assert [str(arrays["class_names"][k]) for k in arrays["labels"]] == labels[rows]
    join(tmp_path / "set", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "class_names", "labels"]
        assert [str(arrays["class_names"][k]) for k in arrays["labels"]] == labels
    # By number it is the same set, which is not made again.
    written = (tmp_path / "set" / "images-00000-of-00002.npz").stat().st_mtime_ns
    assert (
        generate(model, "fast", [i % 6 for i in range(7)], tmp_path / "set", **options) == manifest
    )
    assert (tmp_path / "set" / "images-00000-of-00002.npz").stat().st_mtime_ns == written


def test_a_set_does_not_go_on_under_other_names(model: ft.FlowModel, tmp_path: Path) -> None:
    generate(model, "fast", ["cat"], tmp_path / "set")
    path = named_model.write(tmp_path / "m.safetensors", class_names=[*NAMES[:5], "cold dog"])
    with pytest.raises(ValueError, match="class_names"):
        generate(ft.load(path, device="cpu"), "fast", ["cat"], tmp_path / "set")


def test_sets_without_names_are_what_they_were(tmp_path: Path) -> None:
    model = ft.load("digits", device="cpu")
    manifest = generate(model, "E1", [1, 2], tmp_path / "set")
    assert "class_names" not in manifest
    assert "class_names" not in manifest["settings"]
    arrays, _ = load_arrays(tmp_path / "set" / "images-00000-of-00001.npz")
    assert sorted(arrays) == ["arr_0", "indices", "labels"]


def test_images_that_are_not_finite_are_named_by_class(tmp_path: Path) -> None:
    model = ft.load(named_model.write(tmp_path / "m.safetensors"), device="cpu")
    with torch.no_grad():
        model.predictor.y_embedder.embedding_table.weight[3, 0] = torch.nan  # type: ignore[attr-defined]
    with pytest.raises(ft.NotFiniteError, match=r"image 1 \(label 3, cat, seed 4\): latents"):
        ft.sample(model, "E2", ["heart", "cat"], **OPTIONS)
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ft.NotFiniteError, match=r"image 0 \(label 3, cat, seed 1\)"):
        ft.edit(model, "E2", images, ["cat", "heart"], seed=1)
    with pytest.raises(ft.NotFiniteError, match=r"image 2 \(label 3, cat, seed 0\)"):
        generate(model, "E2", ["heart", 0, "cat"], tmp_path / "set", batch_size=2)
    with pytest.warns(UserWarning, match=r"image 2 \(label 3, cat, seed 0\)"):
        generate(
            model, "E2", ["heart", 0, "cat"], tmp_path / "set", batch_size=2, not_finite="mark"
        )
    arrays, _ = load_arrays(tmp_path / "set" / "images-00000-of-00001.npz")
    assert np.all(arrays["arr_0"][2] == MARK)
    # The null class has no name.
    with torch.no_grad():
        model.predictor.y_embedder.embedding_table.weight[6, 0] = torch.nan  # type: ignore[attr-defined]
    with pytest.raises(ft.NotFiniteError, match=r"image 0 \(label 6\)"):
        ft.sample(model, "E2", noise=torch.zeros(1, 1, 8, 8), output="uint8")
