"""Training resumes: after a kill at any time, and with the same settings only."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from training_runs import ENVIRONMENT, TINY, contents, learnt, log_of, same_bits, tiny

import flowturbo as ft
from flowturbo.storage import files
from flowturbo.storage.files import CheckpointError, load_tensors
from flowturbo.training.train import Train, train


def test_a_run_in_pieces_is_the_run_in_one(tmp_path, data):
    train(tiny(tmp_path / "one", data))
    for steps in (1, 4, 5, 11, 12, 12):
        train(tiny(tmp_path / "many", data, steps=steps))
    assert same_bits(contents(tmp_path / "one"), contents(tmp_path / "many"))
    assert learnt(tmp_path / "one") == learnt(tmp_path / "many")


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"lr": 2e-3},
            {"batch_size": 4},
            {"hidden": 24},
            {"seed": 3},
            {"ema": 0.99},
            {"clip": 1.0},
            {"label_drop": 0.2},
        ),
        *(
            {"schedule": "cosine"},
            {"weight_decay": 0.1},
            {"warmup": 3},
            {"depth": 2},
            {"precision": "fp32"},
        ),
    ],
    ids=str,
)
def test_other_settings_do_not_go_on(tmp_path, data, change):
    train(tiny(tmp_path, data, steps=2))
    before = contents(tmp_path)
    [(name, value)] = change.items()
    with pytest.raises(
        ValueError, match=f"{name} was .* and is now {value!r}.*choose another folder as out"
    ):
        train(tiny(tmp_path, data, steps=2, **change))
    assert same_bits(before, contents(tmp_path))


def test_settings_that_may_change(tmp_path, data):
    train(tiny(tmp_path / "a", data, steps=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(
        tiny(
            tmp_path / "b",
            data,
            steps=12,
            save_every=3,
            log_every=2,
            device=None if not torch.cuda.is_available() else "cpu",
        )
    )
    train(tiny(tmp_path / "c", data))
    assert same_bits(contents(tmp_path / "b"), contents(tmp_path / "c"))


def test_a_cosine_is_as_long_as_it_began(tmp_path, data):
    train(tiny(tmp_path, data, steps=3, schedule="cosine"))
    with pytest.raises(ValueError, match="steps was 3 and is now 4"):
        train(tiny(tmp_path, data, steps=4, schedule="cosine"))
    train(tiny(tmp_path, data, steps=3, schedule="cosine"))


def test_a_damaged_state_does_not_go_on(tmp_path, data):
    train(tiny(tmp_path, data, steps=2))
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        train(tiny(tmp_path, data, steps=3))
    shutil.copy(tmp_path / "model.safetensors", path)
    with pytest.raises(ValueError, match=r"state\.safetensors is no training state"):
        train(tiny(tmp_path, data, steps=3))


def test_a_training_state_is_no_model(tmp_path, data):
    train(tiny(tmp_path, data, steps=1))
    with pytest.raises(CheckpointError, match="training state"):
        ft.load(tmp_path / "state.safetensors", device="cpu")


class Killed(BaseException):
    pass


def killed_at(rename: int, when: str, settings: Train) -> bool:
    """Train until just before or just after a file takes its name for the `rename`th time ->
    whether it came to that.
    """
    original, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == rename and when == "before":
            raise Killed
        original(source, target)
        if count == rename:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        try:
            train(settings)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_between_any_two_files_loses_nothing(tmp_path, data, when):
    """Log, state and model are three files: wherever among them the end comes, the next start makes
    all three right.
    """
    train(tiny(tmp_path / "undisturbed", data))
    for rename in itertools.count(1):
        settings = tiny(tmp_path / str(rename), data)
        if not killed_at(rename, when, settings):
            break
        train(settings)
        assert same_bits(contents(tmp_path / "undisturbed"), contents(settings.out)), rename
        assert learnt(tmp_path / "undisturbed") == learnt(settings.out), rename
    assert (
        rename == 1 + 1 + 3 * 2
    )  # none is left after the log's start and three times state and model


@pytest.mark.slow
def test_kills_at_any_time_lose_nothing(tmp_path, data):
    """kill -9 of a real process, three times, at random moments after it has begun to learn."""
    script = tmp_path / "run.py"
    settings = {**TINY, "data": data, "steps": 300, "save_every": 7}
    script.write_text(f"""
import sys, torch
from pathlib import Path
from flowturbo.training.train import Train, train
train(Train(out=Path(sys.argv[1]), **{settings!r}))
""")
    train(tiny(tmp_path / "undisturbed", data, steps=300, save_every=7))
    out, rng = tmp_path / "killed", random.Random(1)
    log = out / "log.jsonl"

    def lines() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(script), str(out)], env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        goal = lines() + rng.randint(1, 40)
        while process.poll() is None and lines() < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.kill()
        stderr = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), (
            stderr.decode()
        )  # 0: this machine slept while the run came to its end
        kills += process.returncode != 0
        for name in ("model", "state"):  # whole or absent, at any moment
            path = out / f"{name}.safetensors"
            assert not path.exists() or load_tensors(path)
    assert kills
    done = subprocess.run(
        [sys.executable, str(script), str(out)], env=ENVIRONMENT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert same_bits(contents(tmp_path / "undisturbed"), contents(out))
    assert learnt(out) == learnt(tmp_path / "undisturbed")
    assert [line["step"] for line in log_of(out)] == list(range(1, 301))


def test_a_cut_last_line_of_the_log_is_made_again(tmp_path, data):
    train(tiny(tmp_path / "a", data))
    train(tiny(tmp_path / "b", data, steps=5))
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write(
            '{"step": 6, "loss": 1.0, "grad_norm": 1.0, "lr": 0.001, "seconds_per_step": '
            '1.0}\n{"step": 7, "lo'
        )
    train(tiny(tmp_path / "b", data))
    assert learnt(tmp_path / "a") == learnt(tmp_path / "b")
