"""Large sets of images: each image once, the same as by `sample`, and a manifest that shows it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_sets import LABELS, contents, hidden, make
from tiny import tiny_model

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.runtime import rng
from flowturbo.sampling.generate import class_labels
from flowturbo.storage import files
from flowturbo.storage.files import CheckpointError, load_arrays
from flowturbo.storage.image_shards import cut, join, save_shard, verify, write_manifest


def test_a_set_is_what_sample_makes_and_the_manifest_says_so(
    digits: ft.FlowModel, image_set: Path
) -> None:
    expected = ft.sample(
        digits, "E1", LABELS, guidance=1.5, seed=3, batch_size=4, output="uint8"
    ).numpy()
    names = [f"images-0000{k}-of-00003.npz" for k in range(3)]
    assert list(contents(image_set)) == [*names, "manifest.json"]
    assert hidden(image_set) == [".lock"]
    manifest = json.loads((image_set / "manifest.json").read_text())
    assert manifest["shape"] == [22, 8, 8, 3]
    assert (manifest["first"], manifest["last"]) == (0, 21)
    assert manifest["images_sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert [(s["name"], s["first"], s["count"]) for s in manifest["shards"]] == [
        (names[0], 0, 8),
        (names[1], 8, 8),
        (names[2], 16, 6),
    ]
    for shard in manifest["shards"]:
        path = image_set / shard["name"]
        rows = slice(shard["first"], shard["first"] + shard["count"])
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with np.load(path, allow_pickle=False) as arrays:  # any reader of .npz files
            assert np.array_equal(arrays["arr_0"], expected[rows])
            assert arrays["labels"].tolist() == LABELS[rows]
            assert arrays["indices"].tolist() == list(range(22))[rows]
    described = manifest["settings"]
    assert (
        described.items()
        >= {
            "num": 22,
            "seed": 3,
            "plan": "E1",
            "guidance": 1.5,
            "batch_size": 4,
            "shard_size": 8,
        }.items()
    )
    assert (
        described.items()
        >= {"dtype": "float32", "torch": torch.__version__, "flowturbo": ft.__version__}.items()
    )
    assert verify(image_set) == manifest


def test_files_may_be_cut_otherwise_and_images_stay(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path
) -> None:
    one, many = (make(digits, tmp_path / str(size), shard_size=size) for size in (4, 24))
    assert len(one["shards"]) == 6
    assert len(many["shards"]) == 1
    assert one["images_sha256"] == many["images_sha256"] == verify(image_set)["images_sha256"]
    other = make(digits, tmp_path / "other", seed=4)
    assert other["images_sha256"] != one["images_sha256"]


def test_a_longer_set_begins_with_the_shorter(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path
) -> None:
    make(digits, tmp_path, labels=LABELS[:8])
    with (
        np.load(tmp_path / "images-00000-of-00001.npz") as short,
        np.load(image_set / "images-00000-of-00003.npz") as long,
    ):
        assert np.array_equal(short["arr_0"], long["arr_0"])


def test_defaults_are_batches_of_64_and_shards_of_256_or_the_next_multiple(
    digits: ft.FlowModel, tmp_path: Path
) -> None:
    for batch_size, made_of in ((None, (64, 256)), (100, (100, 300)), (300, (300, 300))):
        described = make(
            digits, tmp_path / str(batch_size), labels=[1], batch_size=batch_size, shard_size=None
        )["settings"]
        assert (described["batch_size"], described["shard_size"]) == made_of


def test_random_labels_are_functions_of_seed_and_index_and_uniform() -> None:
    labels = class_labels("random", 20000, 10, seed=5)
    assert np.array_equal(labels[:700], class_labels("random", 700, 10, seed=5))
    assert labels[12345] == rng.random_classes(10, 5, [12345])[0]
    assert (labels != class_labels("random", 20000, 10, seed=6)).mean() == pytest.approx(
        0.9, abs=0.02
    )
    counts = np.bincount(labels, minlength=10)
    assert (
        (counts - 2000) ** 2 / 2000
    ).sum() < 27.9  # chi-squared of 9 degrees of freedom: one seed in a thousand is above
    assert (labels[1:] == labels[:-1]).mean() == pytest.approx(0.1, abs=0.01)
    assert Counter(class_labels("cycle", 50000, 1000, seed=5).tolist()) == dict.fromkeys(
        range(1000), 50
    )
    with pytest.raises(ValueError, match="label_rule must be one of cycle, random, got 'even'"):
        class_labels("even", 3, 10, seed=0)  # type: ignore[arg-type]


def test_every_kind_of_wrong_set_is_noticed(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path
) -> None:
    first, second, third = (f"images-0000{k}-of-00003.npz" for k in range(3))
    make(digits, tmp_path / "other", seed=4)

    def wrong(name: str) -> Path:
        return shutil.copytree(image_set, tmp_path / name)

    out = wrong("a gap")
    (out / second).unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"{third} must go on with image 8, got 16 to 21: images are missing or twice",
    ):
        verify(out)
    out = wrong("the end missing")
    (out / third).unlink()
    with pytest.raises(CheckpointError, match="holds 16 images of 22"):
        verify(out)
    out = wrong("twice")
    shutil.copy(out / first, out / second)
    with pytest.raises(CheckpointError, match=rf"{second} must go on with image 8, got 0 to 7"):
        verify(out)
    out = wrong("one too many")
    shutil.copy(out / first, out / "images-00003-of-00003.npz")
    with pytest.raises(CheckpointError, match="must go on with image 22"):
        verify(out)
    out = wrong("mixed")
    shutil.copy(tmp_path / "other" / second, out / second)
    with pytest.raises(
        CheckpointError,
        match=rf"{second} is of another set than the shards before it: seed was 3 and is now 4",
    ):
        verify(out)
    out = wrong("all of another set")
    for name in (first, second, third):
        shutil.copy(tmp_path / "other" / name, out / name)
    with pytest.raises(
        CheckpointError, match=r"is not what its manifest\.json says: images_sha256 was"
    ):
        verify(out)
    out = wrong("other pixels, well written")
    arrays, description = load_arrays(out / second)
    arrays["arr_0"][3, 2, 1] ^= 1
    files.save_arrays(out / second, arrays, description)
    with pytest.raises(
        CheckpointError, match=r"is not what its manifest\.json says: images_sha256 was"
    ):
        verify(out)
    out = wrong("a torn manifest")
    (out / "manifest.json").write_text((out / "manifest.json").read_text()[:-9])
    with pytest.raises(CheckpointError, match=r"manifest\.json is no whole manifest"):
        verify(out)
    out = wrong("not of this library")
    np.savez(out / second, arr_0=np.zeros((8, 8, 8, 3), np.uint8))
    with pytest.raises(CheckpointError, match=rf"{second} is damaged"):
        verify(out)


def test_one_file_is_all_shards_in_order(image_set: Path, tmp_path: Path) -> None:
    target = tmp_path / "all.npz"
    assert join(image_set, target) == verify(image_set)
    parts = [np.load(image_set / name) for name in contents(image_set) if name.startswith("images")]
    with np.load(target, allow_pickle=False) as arrays:
        assert set(arrays.files) == {"arr_0", "labels"}
        for name in arrays.files:
            assert np.array_equal(arrays[name], np.concatenate([part[name] for part in parts]))
            assert arrays[name].dtype == parts[0][name].dtype
    for wrong, words in (
        (tmp_path / "all.zip", r"must end in \.npz"),
        (image_set / "all.npz", "must lie outside the folder"),
    ):
        with pytest.raises(ValueError, match=words):
            join(image_set, wrong)
    out = shutil.copytree(image_set, tmp_path / "set")
    (out / "images-00001-of-00003.npz").unlink()
    before = target.read_bytes()
    with pytest.raises(CheckpointError):
        join(out, target)
    assert target.read_bytes() == before


def test_joining_holds_no_more_than_a_few_shards_in_memory(tmp_path: Path) -> None:
    out, shards = tmp_path / "set", cut(20 * 16, 16)
    images = np.random.default_rng(0).integers(256, size=(16, 64, 64, 3), dtype=np.uint8)
    for shard in shards:
        save_shard(out, shard, images, np.zeros(16, np.int64), {"num": 320})
    tracemalloc.start()
    try:
        write_manifest(out)
        join(out, tmp_path / "all.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * images.nbytes
    assert (tmp_path / "all.npz").stat().st_size > 20 * images.nbytes


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(labels=[]), "labels must be a list of class numbers, one an image, got shape"),
        (dict(labels=[0.5]), "labels must be a list of class numbers, .* float64"),
        (dict(labels=[[1]]), "labels must be a list of class numbers"),
        (dict(labels=[3, 10]), "labels must be from 0 to 9, got 10"),
        (dict(labels=[-1]), "labels must be from 0 to 9, got -1"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(shard_size=0), "shard_size must be at least 1, got 0"),
        (dict(shard_size=6), "shard_size must be a multiple of batch_size, 4, got 6"),
        (dict(seed=-1), "seed must be from 0"),
        (dict(guidance=float("nan")), "guidance must be finite"),
        (dict(guidance_channels=2), "guidance_channels must be from 1 to 1, got 2"),
        (dict(plan="R1"), "R needs the velocity of an earlier step"),
        (dict(plan=ft.Plan.parse("E1").starting_at(0.5)), "plan must start at 0"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_leave_nothing(
    digits: ft.FlowModel, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make(digits, tmp_path / "set", **change)
    assert not list(tmp_path.iterdir())


def test_models_without_images_and_files_in_the_way_are_refused(
    digits: ft.FlowModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="needs a model that was loaded with a vae"):
        make(tiny_model(), tmp_path / "set")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a folder, but .*file is a file"):
        make(digits, tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


def test_the_command_makes_sets_proves_them_and_joins_them(
    digits: ft.FlowModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cfg1.5"
    words = (
        "--num-fid-samples 21 --global-seed 7 --cfg-scale 2 --per-proc-batch-size 4 "
        "--shard-size 8 --plan E1 --label-rule random"
    )
    command = [
        "sample",
        "--model",
        "digits",
        "--sample-dir",
        str(out),
        *words.split(),
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    labels = class_labels("random", 21, 10, seed=7)
    expected = ft.sample(
        digits, "E1", labels, guidance=2.0, seed=7, batch_size=4, output="uint8"
    ).numpy()
    digest = hashlib.sha256(expected.tobytes()).hexdigest()
    assert (
        "cfg1.5: 21 images by E1 (1 predictor and 0 refiner calls), complete in 3 "
        f"shards, images_sha256 {digest}"
    ) in capsys.readouterr().out
    assert verify(out)["about"] == {
        "model": "digits",
        "refiner": None,
        "vae": None,
        "label_rule": "random",
        "labels": "all",
    }
    assert main(["verify", str(out), "--npz", str(tmp_path / "all.npz")]) == 0
    assert (
        f"all.npz: images 0 to 20, complete in 3 shards, images_sha256 {digest}"
        in capsys.readouterr().out
    )
    with np.load(tmp_path / "all.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], expected)
        assert np.array_equal(arrays["labels"], labels)
    assert main([*command, "--seed", "8"]) == 2
    assert "seed was 7 and is now 8" in capsys.readouterr().err
    (out / "images-00001-of-00003.npz").unlink()
    assert main(["verify", str(out)]) == 2
    assert "images are missing" in capsys.readouterr().err
    assert main(command) == 0
    assert main(["verify", str(out)]) == 0


def test_label_rules_are_the_same_for_one_file_and_a_folder(tmp_path: Path) -> None:
    words = [
        "--model",
        "digits",
        "--num",
        "9",
        "--plan",
        "E1",
        "--label-rule",
        "random",
        "--batch-size",
        "3",
        "--seed",
        "2",
    ]
    assert main(["sample", *words, "--out", str(tmp_path / "one.npz")]) == 0
    assert main(["sample", *words, "--out", str(tmp_path / "set")]) == 0
    with (
        np.load(tmp_path / "one.npz") as one,
        np.load(tmp_path / "set" / "images-00000-of-00001.npz") as shard,
    ):
        assert np.array_equal(one["arr_0"], shard["arr_0"])
        assert np.array_equal(one["labels"], shard["labels"])
