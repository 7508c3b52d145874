"""What a figure is said to be of: the code that gave it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import machine


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("bench/harness.py", "csrc/adaln.cu", "flowturbo/bundled/digits.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("as committed")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    return tmp_path


def test_what_a_run_writes_does_not_change_the_code(checkout):
    commit = machine.code()
    assert commit.startswith("commit ")
    assert "changed" not in commit
    for name in ("nvidia-h100.jsonl", "RESULTS.md", "profile/kernel.py", "growth.png"):
        (checkout / "bench/results" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "bench/results" / name).write_text("a result")
    (checkout / "flowturbo_kernels").mkdir()
    (checkout / "flowturbo_kernels/_C.so").write_text("built")
    assert machine.code() == commit


@pytest.mark.parametrize("name", ["bench/harness.py", "csrc/new/common.cuh", "csrc/adaln.cu"])
def test_a_source_that_is_not_the_commits_changes_it(checkout, name):
    commit = machine.code()
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("changed")
    first = machine.code()
    assert first.startswith(f"{commit}, changed: sources ")
    (checkout / name).write_text("changed again")
    assert machine.code() not in (commit, first)


def test_a_source_that_is_gone_changes_it(checkout):
    commit = machine.code()
    (checkout / "csrc/adaln.cu").unlink()
    assert machine.code().startswith(f"{commit}, changed: sources ")
