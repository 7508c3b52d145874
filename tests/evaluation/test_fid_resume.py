"""An evaluation by FID resumes to the last bit, and refuses other settings and damaged files."""

import os
import signal
import subprocess
import sys
import time

import pytest
from feature_network import RandomNetwork
from fid_runs import contents, of_digits, read, settings
from paths import ROOT

from flowturbo.evaluation.fid import fidelity
from flowturbo.storage.files import CheckpointError


@pytest.mark.parametrize("stop", [0, 5, 12, 43, 59, 60, 61, 75, 104])
def test_a_stopped_evaluation_goes_on_to_the_same_bits(files, tmp_path, few_a_file, stop):
    """60 images of the reference come first, then 45 samples; files of 8."""
    fidelity(settings(files, tmp_path / "undisturbed"), RandomNetwork())

    def fall_over(asked: int) -> None:
        if asked + 4 > stop:
            raise ConnectionError("the power is gone")

    network = RandomNetwork(before=fall_over)
    with pytest.raises(ConnectionError):
        fidelity(settings(files, tmp_path / "stopped"), network)
    assert read(tmp_path / "stopped")["rows"] == []
    rest = RandomNetwork()
    fidelity(settings(files, tmp_path / "stopped"), rest)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    assert network.asked + rest.asked < 105 + 8  # no more than a file is lost
    unused = RandomNetwork()
    fidelity(settings(files, tmp_path / "stopped"), unused)
    assert unused.asked == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from feature_network import RandomNetwork
from flowturbo.evaluation import inception
from flowturbo.evaluation.fid import fidelity
from flowturbo.evaluation.fid_settings import Fidelity
inception.SHARD = 8
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
network = RandomNetwork(before=lambda asked: time.sleep(0.01))
given = dict(metrics=("fid", "sfid", "is", "precision", "recall"),
reference=folder / "reference.npz")
fidelity(Fidelity(**given, samples=folder / "samples.npz", batch_size=4, device="cpu", out=out),
network)
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_bits(files, tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(files)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    here = str(ROOT / "tests" / "helpers")
    subprocess.run(
        [*words, str(tmp_path / "undisturbed"), here], env=environment, check=True, timeout=120
    )
    out = tmp_path / "killed"
    kills = 0
    for stored in (2, 9):
        process = subprocess.Popen([*words, str(out), here], env=environment)
        while process.poll() is None and len(list(out.glob("features/*/*.safetensors"))) < stored:
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    subprocess.run([*words, str(out), here], env=environment, check=True, timeout=120)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_plans_and_metrics_may_be_added(files, tmp_path, few_a_file):
    fidelity(
        of_digits(
            files, tmp_path / "at once", plans=("H1R1", "E2"), metrics=("fid", "is", "recall")
        ),
        RandomNetwork(),
    )
    first, second, third = (RandomNetwork() for _ in range(3))
    fidelity(of_digits(files, tmp_path / "bit by bit"), first)
    fidelity(of_digits(files, tmp_path / "bit by bit", plans=("E2", "H1R1")), second)
    fidelity(
        of_digits(files, tmp_path / "bit by bit", plans=("E2", "H1R1"), metrics="recall"), third
    )
    assert (first.asked, second.asked, third.asked) == (60 + 24, 24, 0)
    ours, theirs = (read(tmp_path / name)["rows"] for name in ("bit by bit", "at once"))
    for row in theirs:
        same = next(other for other in ours if other["samples"] == row["samples"])
        assert {k: same[k] for k in row} == row


def test_a_models_evaluation_goes_on_to_the_same_bits(files, tmp_path, few_a_file):
    fidelity(of_digits(files, tmp_path / "undisturbed"), RandomNetwork())

    def fall_over(asked: int) -> None:
        if asked >= 60 + 12:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fidelity(of_digits(files, tmp_path / "stopped"), RandomNetwork(before=fall_over))
    fidelity(of_digits(files, tmp_path / "stopped"), RandomNetwork())
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(seed=1), "samples.seed was 0 and is now 1"),
        (dict(guidance=2.0), "samples.guidance was 1.5 and is now 2.0"),
        (dict(images=20), "samples.images was 24 and is now 20"),
        (dict(batch_size=8), "settings.batch_size was 4 and is now 8"),
        (dict(dtype="bfloat16"), "environment.dtype was 'float32' and is now 'bfloat16'"),
        (dict(reference="adm.npz"), "reference.sha256 was"),
    ],
)
def test_other_settings_are_refused(files, tmp_path, changes, said):
    fidelity(of_digits(files, tmp_path), RandomNetwork())
    before = contents(tmp_path)
    if "reference" in changes:
        changes = {"reference": files / changes["reference"]}
    with pytest.raises(ValueError, match=r"other settings .*choose another folder as out") as error:
        fidelity(of_digits(files, tmp_path, **changes), RandomNetwork())
    assert said in str(error.value)
    with pytest.raises(ValueError, match=r"network.seed was 0 and is now 1"):
        fidelity(of_digits(files, tmp_path), RandomNetwork(seed=1))
    assert contents(tmp_path) == before


def test_damaged_and_foreign_files_are_refused(files, tmp_path):
    fidelity(settings(files, tmp_path / "a"), RandomNetwork())
    fidelity(settings(files, tmp_path / "b", images=20), RandomNetwork())
    stored = tmp_path / "a" / "features" / "samples" / "00000000.safetensors"
    whole = stored.read_bytes()
    (tmp_path / "a" / "report.json").unlink()
    stored.write_bytes(
        (tmp_path / "b" / "features" / "samples" / "00000000.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"00000000\.safetensors was made with other settings"):
        fidelity(settings(files, tmp_path / "a"), RandomNetwork())
    stored.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        fidelity(settings(files, tmp_path / "a"), RandomNetwork())
    (tmp_path / "a" / "report.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="holds no results of an evaluation"):
        fidelity(settings(files, tmp_path / "a"), RandomNetwork())
