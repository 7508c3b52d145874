"""Sets of images after a kill, damage or other settings:
what is kept, what is made again and what is left alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_sets import ENVIRONMENT, LABELS, Killed, contents, hidden, inodes, make
from tiny import tiny_model

import flowturbo as ft
import flowturbo.sampling.generate as module
from flowturbo.storage import files
from flowturbo.storage.files import CheckpointError, Lock
from flowturbo.storage.image_shards import cut, verify


def test_a_set_that_is_there_is_not_made_again(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(image_set, tmp_path / "set")
    monkeypatch.setattr(module, "sample", None)
    before = inodes(out)
    make(digits, out)
    (out / "manifest.json").unlink()
    make(digits, out)
    assert inodes(out) == before
    assert contents(out) == contents(image_set)


@pytest.mark.parametrize("name", ["images-00000-of-00003.npz", "images-00002-of-00003.npz"])
def test_damaged_shards_are_made_again_and_others_kept(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path, name: str
) -> None:
    out = shutil.copytree(image_set, tmp_path / "set")
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
        assert contents(out) == contents(image_set)
    after = inodes(out)
    assert {k for k in before if before[k] == after[k]} >= before.keys() - {name}


def test_a_shard_under_another_ones_name_is_made_again(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(image_set, tmp_path / "set")
    shutil.copy(out / "images-00000-of-00003.npz", out / "images-00001-of-00003.npz")
    make(digits, out)
    assert contents(out) == contents(image_set)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_end_before_or_after_any_file_loses_nothing(
    digits: ft.FlowModel,
    image_set: Path,
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
        assert contents(out) == contents(image_set)
        assert hidden(out) == [".lock"]
    assert rename == 5  # three shards and the manifest


def test_there_is_no_manifest_while_shards_are_missing(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(image_set, tmp_path / "set")
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
    digits: ft.FlowModel, image_set: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    out = shutil.copytree(image_set, tmp_path / "set")
    with pytest.raises(
        ValueError,
        match=(
            rf"images-00000-of-00003\.npz was made with other settings \({words}.*choose "
            r"another folder"
        ),
    ):
        make(digits, out, **change)
    assert contents(out) == contents(image_set)


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
    manifests = []
    for seed in (True, False):
        model = tiny_model(refiner=seed)
        model.vae = Thumbnails()
        manifests.append(make(model, tmp_path, labels=[1, 2]))
    assert manifests[0] == manifests[1]


def test_files_of_another_kind_are_not_touched(digits: ft.FlowModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "images-of-mine.npz", np.zeros(3))
    before = contents(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds images-of-mine\.npz, which is none of the 3 shards: choose another folder",
    ):
        make(digits, tmp_path)
    assert contents(tmp_path) == before


def test_two_runs_do_not_write_one_folder(
    digits: ft.FlowModel, image_set: Path, tmp_path: Path
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
    assert contents(out) == contents(image_set)


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
