"""FID from the command line, and mistakes that are told before anything is read."""

from hashlib import sha256
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from feature_network import RandomNetwork
from fid_runs import REFERENCE, SAMPLES, inside, read, settings

from flowturbo.cli.main import main
from flowturbo.evaluation import inception
from flowturbo.evaluation.fid import fidelity


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            dict(metrics="fid,kid"),
            "metrics must be some of fid, sfid, is, precision, recall, got fid, kid",
        ),
        (dict(metrics=()), "got none"),
        (dict(model="digits"), "not both"),
        (dict(samples=None), "give samples or a model"),
        (dict(reference=None), "reference must be given"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(images=0), "images must be at least 1"),
        (dict(images=3), "need at least 4 images, but samples has 3"),
        (dict(images=1, metrics="fid"), "need at least 2 images, but samples has 1"),
        (dict(reference="alone.npz"), "has no arr_0, the images that sfid, precision, recall need"),
        (dict(reference="wide.npz"), "reference has mu of 7 features, but the network gives 6"),
        (dict(reference="nowhere"), "nowhere does not exist"),
        (
            dict(samples=None, model="digits", plans=("R2",)),
            "R needs the velocity of an earlier step",
        ),
    ],
)
def test_mistakes_are_told_at_the_door(files, tmp_path, changes, said):
    np.savez(files / "alone.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(files / "wide.npz", arr_0=REFERENCE, mu=np.zeros(7), sigma=np.eye(7))
    if changes.get("reference"):
        changes = {**changes, "reference": files / changes["reference"]}
    network = RandomNetwork()
    with pytest.raises(ValueError, match=r"\w") as error:
        fidelity(settings(files, tmp_path / "out", **changes), network)
    assert said in str(error.value)
    assert network.asked == 0
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_missing_weights_by_name(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    words = (
        f"evaluate --metrics fid,is --reference {files}/adm.npz --samples {files}/samples.npz "
        f"--out {tmp_path}/out"
    )
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert f"download {inception.URL} (91 MB) and put it into {tmp_path / 'cache'}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_command_scores_by_inception(files, tmp_path, monkeypatch, capsys):
    """From the command line to the report, with random weights in a file of the published
    layout.
    """
    from inception_weights import random_weights

    path = tmp_path / "weights.pth"
    torch.save(random_weights(), path)
    monkeypatch.setattr(inception, "SHA256", sha256(path.read_bytes()).hexdigest())
    np.savez(tmp_path / "few.npz", arr_0=REFERENCE[:9])
    words = (
        f"--reference {tmp_path}/few.npz --samples {files}/samples.npz --inception {path} "
        f"--out {tmp_path}/out --images 7"
    )
    assert (
        main(["evaluate", "--metrics", "is,precision,recall", *words.split(), "--device", "cpu"])
        == 0
    )
    assert f"{tmp_path}/out/report.md" in capsys.readouterr().out
    results = read(tmp_path / "out")
    assert results["network"]["weights_sha256"] == inception.SHA256
    assert results["network"]["code"].startswith("torch-fidelity 0.")
    network = inception.Inception(path)
    reference, samples = (
        network.read(x).pool.double().numpy() for x in (REFERENCE[:9], SAMPLES[:7])
    )
    (row,) = results["rows"]
    assert row["precision"] == pytest.approx(inside(samples, reference), abs=1e-12)
    assert row["recall"] == pytest.approx(inside(reference, samples), abs=1e-12)


def test_evaluate_with_metrics_is_what_fid_was_called_before(capsys):
    def help_of(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return capsys.readouterr().out

    assert "--classifier-steps" in help_of("evaluate")
    for words in (("fid",), ("evaluate", "--metrics=fid")):
        assert "--reference" in help_of(*words)
        assert "--classifier-steps" not in help_of(*words)
