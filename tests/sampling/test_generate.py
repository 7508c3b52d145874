"""Large sets: the same images whoever makes which of them and whatever is killed meanwhile, each
once, and a proof of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from tiny import tiny_model

import flowturbo as ft
import flowturbo.sampling.generate as module
from flowturbo.cli.main import main
from flowturbo.runtime import rng
from flowturbo.sampling.generate import class_labels, generate
from flowturbo.storage import files
from flowturbo.storage.files import CheckpointError, Lock, load_arrays
from flowturbo.storage.image_shards import cut, join, save_shard, verify, write_manifest

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
KILL_RUNS = int(os.environ.get("FLOWTURBO_KILL_RUNS", "1"))
"""How often the test with real kills runs; it kills three times a run."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> ft.FlowModel:
    return ft.load("digits", device="cpu")


LABELS = [i % 10 for i in range(22)]
OPTIONS: dict[str, Any] = dict(guidance=1.5, seed=3, batch_size=4, shard_size=8)


def make(model: ft.FlowModel, out: Path, **changes: Any) -> dict[str, Any]:
    """22 images in shards of 8, 8 and 6."""
    given = {"plan": "E1", "labels": LABELS, **OPTIONS, **changes}
    return generate(model, given.pop("plan"), given.pop("labels"), out, **given)


@pytest.fixture(scope="module")
def reference(digits: ft.FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that nothing disturbed."""
    out = tmp_path_factory.mktemp("reference") / "set"
    make(digits, out)
    return out


def contents(out: Path) -> dict[str, bytes]:
    """All that a person sees in a folder."""
    return {
        path.name: path.read_bytes()
        for path in sorted(out.iterdir())
        if not path.name.startswith(".")
    }


def inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.glob("images-*.npz")}


def hidden(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob(".*"))


# What is made.


def test_a_set_is_what_sample_makes_and_the_manifest_says_so(
    digits: ft.FlowModel, reference: Path
) -> None:
    expected = ft.sample(
        digits, "E1", LABELS, guidance=1.5, seed=3, batch_size=4, output="uint8"
    ).numpy()
    names = [f"images-0000{k}-of-00003.npz" for k in range(3)]
    assert list(contents(reference)) == [*names, "manifest.json"]
    assert hidden(reference) == [".lock"]
    manifest = json.loads((reference / "manifest.json").read_text())
    assert manifest["shape"] == [22, 8, 8, 3]
    assert (manifest["first"], manifest["last"]) == (0, 21)
    assert manifest["images_sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert [(s["name"], s["first"], s["count"]) for s in manifest["shards"]] == [
        (names[0], 0, 8),
        (names[1], 8, 8),
        (names[2], 16, 6),
    ]
    for shard in manifest["shards"]:
        path = reference / shard["name"]
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
    assert verify(reference) == manifest


def test_files_may_be_cut_otherwise_and_images_stay(
    digits: ft.FlowModel, reference: Path, tmp_path: Path
) -> None:
    one, many = (make(digits, tmp_path / str(size), shard_size=size) for size in (4, 24))
    assert len(one["shards"]) == 6
    assert len(many["shards"]) == 1
    assert one["images_sha256"] == many["images_sha256"] == verify(reference)["images_sha256"]
    other = make(digits, tmp_path / "other", seed=4)
    assert other["images_sha256"] != one["images_sha256"]


def test_a_longer_set_begins_with_the_shorter(
    digits: ft.FlowModel, reference: Path, tmp_path: Path
) -> None:
    make(digits, tmp_path, labels=LABELS[:8])
    with (
        np.load(tmp_path / "images-00000-of-00001.npz") as short,
        np.load(reference / "images-00000-of-00003.npz") as long,
    ):
        assert np.array_equal(short["arr_0"], long["arr_0"])


def test_defaults_are_batches_of_64_and_shards_of_256_or_the_next_multiple(
    digits: ft.FlowModel, tmp_path: Path
) -> None:
    for given, made_of in ((None, (64, 256)), (100, (100, 300)), (300, (300, 300))):
        described = make(
            digits, tmp_path / str(given), labels=[1], batch_size=given, shard_size=None
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


# What is kept and what is made again.


def test_a_set_that_is_there_is_not_made_again(
    digits: ft.FlowModel, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(reference, tmp_path / "set")
    monkeypatch.setattr(module, "sample", None)
    before = inodes(out)
    make(digits, out)
    (out / "manifest.json").unlink()
    make(digits, out)
    assert inodes(out) == before
    assert contents(out) == contents(reference)


@pytest.mark.parametrize("name", ["images-00000-of-00003.npz", "images-00002-of-00003.npz"])
def test_damaged_shards_are_made_again_and_others_kept(
    digits: ft.FlowModel, reference: Path, tmp_path: Path, name: str
) -> None:
    out = shutil.copytree(reference, tmp_path / "set")
    before, content = inodes(out), (out / name).read_bytes()
    flips = [
        content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        for at in (0, 30, 300, len(content) - 70, len(content) - 1)
    ]
    for damaged in (*flips, content[:-1], b""):
        (out / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            verify(out)
        with pytest.warns(UserWarning, match=rf"{name} is .*: it is made again"):
            make(digits, out)
        assert contents(out) == contents(reference)
    after = inodes(out)
    assert {k for k in before if before[k] == after[k]} >= before.keys() - {name}


def test_a_shard_under_another_ones_name_is_made_again(
    digits: ft.FlowModel, reference: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(reference, tmp_path / "set")
    shutil.copy(out / "images-00000-of-00003.npz", out / "images-00001-of-00003.npz")
    make(digits, out)
    assert contents(out) == contents(reference)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_end_before_or_after_any_file_loses_nothing(
    digits: ft.FlowModel,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    plain = os.replace
    for rename in itertools.count(1):
        out, seen = tmp_path / str(rename), 0

        def replace(source: Any, target: Any, rename: int = rename) -> None:
            nonlocal seen
            seen += 1
            if seen == rename and when == "before":
                raise Killed
            plain(source, target)
            if seen == rename:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", replace)
            try:
                make(digits, out)
                break
            except Killed:
                pass
        kept = inodes(out)
        assert len(kept) == min(3, rename - (when == "before"))
        assert (out / "manifest.json").exists() == (rename == 4 and when == "after")
        (out / ".images-00001-of-00003.npz.x7.tmp").write_bytes(
            b"torn"
        )  # what a kill in the middle of a write leaves
        (out / ".manifest.json.x8.tmp").write_bytes(b"{")
        make(digits, out)
        assert inodes(out).items() >= kept.items()
        assert contents(out) == contents(reference)
        assert hidden(out) == [".lock"]
    assert rename == 5  # three shards and the manifest


def test_there_is_no_manifest_while_shards_are_missing(
    digits: ft.FlowModel, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(reference, tmp_path / "set")
    (out / "images-00001-of-00003.npz").unlink()
    monkeypatch.setattr(module, "sample", None)
    with pytest.raises(TypeError):
        make(digits, out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(
        CheckpointError, match=r"holds no manifest\.json: a run writes it when all shards are there"
    ):
        verify(out)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(seed=4), "seed was 3 and is now 4"),
        (dict(plan="A2"), "plan was 'E1' and is now 'A2', grid was"),
        (
            dict(plan=ft.Plan.parse("E1", guidance_interval=(0, 0.5))),
            r"guidance_interval was \[0.0, 1.0\] and is now \[0.0, 0.5\]",
        ),
        (dict(guidance=2.0), "guidance was 1.5 and is now 2.0"),
        (dict(batch_size=8), "batch_size was 4 and is now 8"),
        (dict(shard_size=12), "shard_size was 8 and is now 12"),
        (dict(labels=LABELS[:-1]), "num was 22 and is now 21, labels was"),
        (dict(labels=LABELS[::-1]), "labels was '"),
    ],
    ids=str,
)
def test_sets_of_other_settings_are_not_touched(
    digits: ft.FlowModel, reference: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    out = shutil.copytree(reference, tmp_path / "set")
    with pytest.raises(
        ValueError,
        match=(
            rf"images-00000-of-00003\.npz was made with other settings \({words}.*choose "
            r"another folder"
        ),
    ):
        make(digits, out, **change)
    assert contents(out) == contents(reference)


def test_sets_of_other_models_or_machines_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.vae = Thumbnails()
    options = dict(labels=[1, 2], plan="H1R1")
    make(model, tmp_path, **options)
    before = contents(tmp_path)
    with torch.no_grad():
        model.refiner.final_layer.linear.bias[0] += 1e-3  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"settings \(refiner was"):
        make(model, tmp_path, **options)
    other = tiny_model(seed=5)
    other.vae = Thumbnails()
    with pytest.raises(ValueError, match=r"settings \(predictor was .* refiner was"):
        make(other, tmp_path, **options)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "abacus")
    with pytest.raises(ValueError, match=r"device was 'cpu .*' and is now 'cpu abacus'"):
        make(model, tmp_path, **options)
    assert contents(tmp_path) == before


def test_sets_of_a_fitted_plan_with_other_weights_are_not_touched(
    digits: ft.FlowModel, tmp_path: Path
) -> None:
    """The letters and the grid may be the same."""
    make(digits, tmp_path, plan=ft.Plan("L", (0, 1), weights=[[1.0]]))
    with pytest.raises(
        ValueError, match=r"other settings \(weights was \[\[1\.0\]\] and is now \[\[0\.9\]\]\)"
    ):
        make(digits, tmp_path, plan=ft.Plan("L", (0, 1), weights=[[0.9]]))


class Thumbnails:
    """The first three of four channels, as they are."""

    factor = 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents[:, :3] * 50 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise NotImplementedError


def test_a_refiner_that_the_plan_does_not_use_does_not_matter(tmp_path: Path) -> None:
    made = []
    for seed in (True, False):
        model = tiny_model(refiner=seed)
        model.vae = Thumbnails()
        made.append(make(model, tmp_path, labels=[1, 2]))
    assert made[0] == made[1]


def test_files_of_another_kind_are_not_touched(digits: ft.FlowModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "images-of-mine.npz", np.zeros(3))
    before = contents(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds images-of-mine\.npz, which is none of the 3 shards: choose another folder",
    ):
        make(digits, tmp_path)
    assert contents(tmp_path) == before


# What verify and join say.


def test_every_kind_of_wrong_set_is_noticed(
    digits: ft.FlowModel, reference: Path, tmp_path: Path
) -> None:
    first, second, third = (f"images-0000{k}-of-00003.npz" for k in range(3))
    make(digits, tmp_path / "other", seed=4)

    def wrong(name: str) -> Path:
        return shutil.copytree(reference, tmp_path / name)

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


def test_one_file_is_all_shards_in_order(reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "all.npz"
    assert join(reference, target) == verify(reference)
    parts = [np.load(reference / name) for name in contents(reference) if name.startswith("images")]
    with np.load(target, allow_pickle=False) as arrays:
        assert set(arrays.files) == {"arr_0", "labels"}
        for name in arrays.files:
            assert np.array_equal(arrays[name], np.concatenate([part[name] for part in parts]))
            assert arrays[name].dtype == parts[0][name].dtype
    for wrong, words in (
        (tmp_path / "all.zip", r"must end in \.npz"),
        (reference / "all.npz", "must lie outside the folder"),
    ):
        with pytest.raises(ValueError, match=words):
            join(reference, wrong)
    out = shutil.copytree(reference, tmp_path / "set")
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


# What is refused.


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


def test_two_runs_do_not_write_one_folder(
    digits: ft.FlowModel, reference: Path, tmp_path: Path
) -> None:
    """Whichever process of the other run lives, alone or not: then nothing is removed that it may
    be writing.
    """
    pytest.importorskip("fcntl")
    out = tmp_path / "set"
    out.mkdir()
    (out / ".images-00001-of-00003.npz.x7.tmp").write_bytes(b"being written")
    for alone in (True, False):
        with contextlib.closing(Lock(out / ".lock")) as lock:
            assert lock.take(alone=alone)
            with pytest.raises(
                ValueError, match=r"another run is writing to out .*: wait for its end"
            ):
                make(digits, out)
    assert hidden(out) == [".images-00001-of-00003.npz.x7.tmp", ".lock"]
    make(digits, out)
    assert contents(out) == contents(reference)


def test_every_process_of_a_run_keeps_others_out(tmp_path: Path) -> None:
    """One may live on when process 0 is killed."""
    pytest.importorskip("fcntl")

    class Member(module.Team):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def from_rank0(self, find: Any) -> Any:
            return find() if self.rank == 0 else ({"num": 5}, shards)

    shards = cut(5, 2)
    for rank in (0, 1):
        with contextlib.closing(Lock(tmp_path / ".lock")) as lock:
            with module._writing(tmp_path, Member(rank), shards, {"num": 5}) as missing:
                assert missing == shards
                assert not lock.take(alone=True)
                assert lock.take(alone=False)
            assert lock.take(alone=True)
    with pytest.raises(ValueError, match="process 1 is not as process 0: num was 5 and is now 6"):
        module._writing(tmp_path, Member(1), shards, {"num": 6}).__enter__()


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    code = (
        "import sys, time; from flowturbo.storage.files import Lock; lock = Lock(sys.argv[1]); "
        "print(lock.take(alone=True), flush=True)"
    )
    command = [sys.executable, "-c", f"{code}; time.sleep(600)", str(tmp_path / "lock")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "True\n"
            with contextlib.closing(Lock(tmp_path / "lock")) as lock:
                assert not lock.take(alone=False)
                holder.kill()
                holder.wait()
                assert lock.take(alone=False)
                assert lock.take(alone=True)
        finally:
            holder.kill()


# The command.


def test_the_command_makes_sets_proves_them_and_joins_them(
    digits: ft.FlowModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cfg1.5"
    words = (
        "--num-fid-samples 21 --global-seed 7 --cfg-scale 2 --per-proc-batch-size 4 "
        "--shard-size 8 --plan E1 --label-rule random"
    )
    command = ["sample", "--sample-dir", str(out), *words.split(), "--device", "cpu"]
    assert main(command) == 0
    labels = class_labels("random", 21, 10, seed=7)
    expected = ft.sample(
        digits, "E1", labels, guidance=2.0, seed=7, batch_size=4, output="uint8"
    ).numpy()
    digest = hashlib.sha256(expected.tobytes()).hexdigest()
    assert (
        "cfg1.5: 21 images by E1 (1 predictor and 0 refiner calls), each once and whole in 3 "
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
        f"all.npz: images 0 to 20, each once and whole in 3 shards, images_sha256 {digest}"
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


# Several processes.

NUM = 90
WORDS = (
    f"sample --num-fid-samples {NUM} --plan H1P2 --batch-size 4 --shard-size 8 --seed 5 "
    "--device cpu"
).split()


@pytest.fixture(scope="module")
def alone(digits: ft.FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes: 12 shards, the last of 2 images."""
    out = tmp_path_factory.mktemp("alone") / "set"
    finish(digits, out)
    return out


def finish(digits: ft.FlowModel, out: Path) -> None:
    """`WORDS` in this process."""
    about = {
        "model": "digits",
        "refiner": None,
        "vae": None,
        "label_rule": "cycle",
        "labels": "all",
    }
    generate(
        digits,
        "H1P2",
        [i % 10 for i in range(NUM)],
        out,
        guidance=1.5,
        seed=5,
        batch_size=4,
        shard_size=8,
        about=about,
    )


def torchrun(out: Path, **environment: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "flowturbo",
        *WORDS,
    ]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_make_the_set_of_one(alone: Path, tmp_path: Path) -> None:
    process = torchrun(tmp_path / "set")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert (
        said.count(
            f"set: {NUM} images by H1P2 (4 predictor and 0 refiner calls), each once and whole in "
            "12 shards"
        )
        == 1
    )
    assert contents(tmp_path / "set") == contents(alone)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shards_are_dealt_out_evenly_each_once(
    digits: ft.FlowModel,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    """Also those that a run which was killed left to be made, to another number of processes."""
    out = tmp_path / "begun"
    make(digits, out, shard_size=4)  # six of them
    whole = contents(out)
    (out / "images-00001-of-00006.npz").unlink()
    shares = []
    for rank in range(size):

        class Member(module.Team):
            def __init__(self, rank: int = rank) -> None:
                self.rank, self.size = rank, size

            def from_rank0(self, find: Any) -> Any:
                return find()

            def barrier(self) -> None:
                raise Killed

        share = shutil.copytree(out, tmp_path / f"{size} {rank}")
        before = set(contents(share))
        (share / "images-00004-of-00006.npz").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(module, "Team", Member)
            with pytest.raises(Killed):
                make(digits, share, shard_size=4)
        shares.append(
            set(contents(share)) - (before - {"images-00004-of-00006.npz", "manifest.json"})
        )
        assert contents(share).items() <= whole.items()
    assert sorted(name for share in shares for name in share) == [
        "images-00001-of-00006.npz",
        "images-00004-of-00006.npz",
    ]
    assert max(map(len, shares)) == 1


def two_by_hand(words: list[str]) -> list[tuple[int, str]]:
    """Two processes without torchrun, which would end one with the other -> the exit status of
    each, and what it said.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env=ENVIRONMENT | place | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


ENDS_WELL = """
import os, sys
from flowturbo.cli import main
status = main()
for thread in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{thread}/comm") as name:
        if name.read().startswith(("gloo", "pt_gloo", "pt_tcpstore")):
            # It would abort the process if it met the end of the interpreter.
            status = f"a thread of the group is left: {thread}"
sys.exit(status)
"""


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["raise OSError('the disk is full')", "os.kill(os.getpid(), 9)"])
def test_when_one_process_ends_the_other_says_so_and_does_not_wait(
    digits: ft.FlowModel, alone: Path, tmp_path: Path, failing: int, how: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(f"""
import os
import flowturbo.sampling.generate as module
saved, plain = 0, module.save_shard

def save_shard(*given):
    global saved
    saved += 1
    if saved == 3:
        {how}
    plain(*given)

if os.environ["RANK"] == "{failing}":
    module.save_shard = save_shard
{ENDS_WELL}""")
    ends = two_by_hand([str(script), *WORDS, "--out", str(tmp_path / "set")])
    status, said = ends[1 - failing]
    assert status == 2
    assert "another process of this run has ended: start the same command again to go on" in said
    status, said = ends[failing]
    assert (status, "the disk is full" in said) == (
        (2, True) if "disk" in how else (-signal.SIGKILL, False)
    )
    assert made(tmp_path / "set") == 2 + 6  # what the failing one had done, and all of the other's
    finish(digits, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(alone)


def test_what_process_0_refuses_all_refuse(alone: Path, tmp_path: Path) -> None:
    out = shutil.copytree(alone, tmp_path / "set")
    for status, said in two_by_hand(["-c", ENDS_WELL, *WORDS, "--out", str(out), "--seed", "6"]):
        assert "flowturbo: error: out " in said
        assert "seed was 5 and is now 6" in said
        assert status == 2
    assert contents(out) == contents(alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_on_cuda_process_0_chooses_kernels_and_captures_before_the_others(rank: int) -> None:
    """Or several would measure at once, and choose each for itself."""
    seen: list[str] = []

    class Member(module.Team):
        def __init__(self) -> None:
            self.rank = rank

        def from_rank0(self, find: Any) -> Any:
            seen.append("told")
            return find() if rank == 0 else None

    module._warm_up(Member(), lambda: seen.append("run"))
    assert seen == ["told", "run", "run"]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes in /proc"
)


def processes(mark: str) -> dict[str, int]:
    """The live processes of a run by their rank; the launcher, which has none, is left out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "environ").read_bytes().split(b"\0")
            if (
                f"FLOWTURBO_TEST_RUN={mark}".encode() in words
                and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            ):
                ranks = [word[5:].decode() for word in words if word.startswith(b"RANK=")]
                found |= {rank: int(path.name) for rank in ranks}
    return found


def made(out: Path) -> int:
    return len(list(out.glob("images-*.npz")))


def kill_when_under_way(out: Path, victim: str, chance: random.Random) -> tuple[bool, str]:
    """Start two processes, and end one of them, or their launcher, by SIGKILL when some shards more
    are there -> whether it came to that before the end, and the mark of what may live on."""
    mark = uuid.uuid4().hex
    goal = made(out) + chance.randint(1, 3)
    process = torchrun(out, FLOWTURBO_TEST_RUN=mark)
    deadline = time.monotonic() + 120
    while process.poll() is None and made(out) < goal:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(chance.random() * 0.06)  # about what a shard takes
    alive = processes(mark)
    if process.poll() is None and victim in (*alive, "launcher"):
        os.kill(process.pid if victim == "launcher" else alive[victim], signal.SIGKILL)
    if victim == "launcher":
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()
    else:
        said = process.communicate(timeout=60)[0]
        assert (
            process.returncode == 0
            or "SIGKILL" in said
            or "exitcode: -9" in said.replace(" ", "").replace(":", ": ")
        ), said
    return process.returncode != 0, mark


@needs_proc
@pytest.mark.parametrize("run", range(KILL_RUNS))
def test_kills_at_any_time_lose_nothing(
    digits: ft.FlowModel, alone: Path, tmp_path: Path, run: int
) -> None:
    """SIGKILL of each of two processes and of their launcher, in any order, at random moments after
    the first shard is there.
    """
    chance, whole, out = random.Random(run), contents(alone), tmp_path / "set"
    out.mkdir()
    kills = 0
    for victim in chance.sample(["0", "1", "launcher"], 3):
        killed, mark = kill_when_under_way(out, victim, chance)
        kills += killed
        assert contents(out).items() <= whole.items(), (
            victim
        )  # what is there is whole, at any moment
        refused = 0
        while workers := processes(
            mark
        ):  # of a dead launcher: they keep others out of their folder, and may be killed too
            if not refused:
                with pytest.raises(ValueError, match="another run is writing"):
                    finish(digits, out)
            refused += 1
            for pid in workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        assert contents(out).items() <= whole.items(), victim
        print(
            f"run {run}: killed {victim} with {made(out)} of 12 shards there, "
            f"{len(list(out.glob('.*.tmp')))} torn"
        )
    assert kills
    process = torchrun(out)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert contents(out) == whole
    assert hidden(out) == [".lock"]
    assert verify(out)["last"] == NUM - 1
