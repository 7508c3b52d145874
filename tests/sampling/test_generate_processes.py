"""One set of images by several processes: the same as by one, whichever of them is killed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from generated_sets import ENVIRONMENT, NUM, WORDS, Killed, contents, finish, hidden, make, torchrun

import flowturbo as ft
import flowturbo.sampling.generate as module
from flowturbo.storage.image_shards import verify

KILL_RUNS = int(os.environ.get("FLOWTURBO_KILL_RUNS", "1"))
"""How often the test with real kills runs; it kills three times a run."""


def test_two_processes_make_the_set_of_one(larger_set: Path, tmp_path: Path) -> None:
    process = torchrun(tmp_path / "set")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert (
        said.count(
            f"set: {NUM} images by H1P2 (4 predictor and 0 refiner calls), complete in 12 shards"
        )
        == 1
    )
    assert contents(tmp_path / "set") == contents(larger_set)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shards_are_dealt_out_evenly_each_once(
    digits: ft.FlowModel,
    image_set: Path,
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
from flowturbo.cli.main import main
status = main()
for thread in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{thread}/comm") as name:
        if name.read().startswith(("gloo", "pt_gloo", "pt_tcpstore")):
            # It would abort the process if it met the end of the interpreter.
            status = f"a thread of the group is left: {thread}"
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["raise OSError('the disk is full')", "os.kill(os.getpid(), 9)"])
def test_when_one_process_ends_the_other_says_so_and_does_not_wait(
    digits: ft.FlowModel, larger_set: Path, tmp_path: Path, failing: int, how: str
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
    assert (
        shard_count(tmp_path / "set") == 2 + 6
    )  # what the failing one had done, and all of the other's
    finish(digits, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(larger_set)


@pytest.mark.slow
def test_what_process_0_refuses_all_refuse(larger_set: Path, tmp_path: Path) -> None:
    out = shutil.copytree(larger_set, tmp_path / "set")
    for status, said in two_by_hand(["-c", ENDS_WELL, *WORDS, "--out", str(out), "--seed", "6"]):
        assert "flowturbo: error: out " in said
        assert "seed was 5 and is now 6" in said
        assert status == 2
    assert contents(out) == contents(larger_set)


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
    by_rank = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "environ").read_bytes().split(b"\0")
            if (
                f"FLOWTURBO_TEST_RUN={mark}".encode() in words
                and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            ):
                ranks = [word[5:].decode() for word in words if word.startswith(b"RANK=")]
                by_rank |= {rank: int(path.name) for rank in ranks}
    return by_rank


def shard_count(out: Path) -> int:
    return len(list(out.glob("images-*.npz")))


def kill_when_under_way(out: Path, victim: str, chance: random.Random) -> tuple[bool, str]:
    """Start two processes, and end one of them, or their launcher, by SIGKILL when some shards more
    are there -> whether it came to that before the end, and the mark of what may live on."""
    mark = uuid.uuid4().hex
    goal = shard_count(out) + chance.randint(1, 3)
    process = torchrun(out, FLOWTURBO_TEST_RUN=mark)
    deadline = time.monotonic() + 120
    while process.poll() is None and shard_count(out) < goal:
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


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("run", range(KILL_RUNS))
def test_kills_at_any_time_lose_nothing(
    digits: ft.FlowModel, larger_set: Path, tmp_path: Path, run: int
) -> None:
    """SIGKILL of each of two processes and of their launcher, in any order, at random moments after
    the first shard is there.
    """
    chance, whole, out = random.Random(run), contents(larger_set), tmp_path / "set"
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
            f"run {run}: killed {victim} with {shard_count(out)} of 12 shards there, "
            f"{len(list(out.glob('.*.tmp')))} torn"
        )
    assert kills
    process = torchrun(out)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert contents(out) == whole
    assert hidden(out) == [".lock"]
    assert verify(out)["last"] == NUM - 1
