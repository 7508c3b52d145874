"""FID as published, on small images and a small random network: right figures, resumable to the
last bit, and honest reports.
"""

import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_network import RandomNetwork
from paths import ROOT
from PIL import Image

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.evaluation import inception as features
from flowturbo.evaluation.fid import METRICS, Fidelity, fidelity
from flowturbo.evaluation.fid_report import TITLES
from flowturbo.storage.files import CheckpointError

ALL = ("fid", "sfid", "is", "precision", "recall")


def images(seed: int, count: int, mean: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    smooth = generator.normal(mean, 60, (count, 4, 4, 3)).repeat(3, axis=1).repeat(3, axis=2)
    return np.clip(smooth, 0, 255).astype(np.uint8)


SAMPLES, REFERENCE = images(0, 45, 120), images(1, 60, 140)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    np.savez(folder / "samples.npz", arr_0=SAMPLES)
    np.savez(folder / "reference.npz", arr_0=REFERENCE)
    whole = images(2, 500, 130)  # of which the reference's images are taken to be a part
    pool, spatial = (x.double().numpy() for x in RandomNetwork().read(whole))
    np.savez(
        folder / "adm.npz",
        arr_0=REFERENCE,
        mu=pool.mean(0),
        sigma=np.cov(pool, rowvar=False),
        mu_s=spatial.mean(0),
        sigma_s=np.cov(spatial, rowvar=False),
    )
    return folder


def settings(files: Path, out: Path, **changes) -> Fidelity:
    these = dict(
        metrics=ALL,
        reference=files / "reference.npz",
        samples=files / "samples.npz",
        batch_size=4,
        device="cpu",
        out=out,
    )
    return Fidelity(**{**these, **changes})


@pytest.fixture
def few_a_file(monkeypatch):
    monkeypatch.setattr(features, "SHARD", 8)


def read(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def fid_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    (m, s), (w, t) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return float((m - w) @ (m - w) + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real))


def arrays(network: RandomNetwork, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(x.double().numpy() for x in network.read(pixels))


def inside(points: np.ndarray, manifold: np.ndarray) -> float:
    """The share of points within the third nearest other neighbour of some point of the
    manifold.
    """
    reach = np.sort(np.linalg.norm(manifold[:, None] - manifold[None], axis=2), axis=1)[:, 3]
    return float(
        (np.linalg.norm(points[:, None] - manifold[None], axis=2) <= reach).any(axis=1).mean()
    )


def test_figures_are_those_of_independent_formulas(files, tmp_path):
    assert fidelity(settings(files, tmp_path), RandomNetwork()) == tmp_path / "report.md"
    (pool, spatial), (pool_r, spatial_r) = (
        arrays(RandomNetwork(), x) for x in (SAMPLES, REFERENCE)
    )
    logits = RandomNetwork().logits(torch.from_numpy(pool)).numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    score = np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1)))
    (row,) = read(tmp_path)["rows"]
    assert row["samples"] == "samples"
    assert row["images"] == 45
    assert row["fid"] == pytest.approx(fid_by_scipy(pool, pool_r), rel=1e-6)
    assert row["sfid"] == pytest.approx(fid_by_scipy(spatial, spatial_r), rel=1e-6)
    assert row["is"] == pytest.approx(score, rel=1e-9)
    assert row["precision"] == pytest.approx(inside(pool, pool_r), abs=1e-12)
    assert row["recall"] == pytest.approx(inside(pool_r, pool), abs=1e-12)
    assert len({0.0, 1.0, row["precision"], row["recall"]}) == 4
    assert row["fid"] > 0.01
    assert row["is"] > 1.1


def test_adms_gaussians_are_taken_where_the_file_has_them(files, tmp_path):
    whole = images(2, 500, 130)
    (pool, spatial), (pool_r, spatial_r) = (arrays(RandomNetwork(), x) for x in (SAMPLES, whole))
    network = RandomNetwork()
    fidelity(
        settings(files, tmp_path, reference=files / "adm.npz", metrics=("fid", "sfid", "is")),
        network,
    )
    assert network.asked == len(SAMPLES)  # the reference's images are not needed
    (row,) = read(tmp_path)["rows"]
    assert row["fid"] == pytest.approx(fid_by_scipy(pool, pool_r), rel=1e-6)
    assert row["sfid"] == pytest.approx(fid_by_scipy(spatial, spatial_r), rel=1e-6)
    assert read(tmp_path)["reference"]["gaussians"] == "its own mu, sigma and mu_s, sigma_s"
    fidelity(settings(files, tmp_path, reference=files / "adm.npz"), network)
    assert network.asked == len(SAMPLES) + len(REFERENCE)  # for precision and recall
    (again,) = read(tmp_path)["rows"]
    assert again["precision"] == pytest.approx(
        inside(pool, arrays(RandomNetwork(), REFERENCE)[0]), abs=1e-12
    )
    assert {k: again[k] for k in row} == row


def test_images_in_any_packing_give_the_same_figures(files, tmp_path):
    """One file, shards, and PNG files: of samples and of the reference."""
    for name, pixels in (("samples", SAMPLES), ("reference", REFERENCE)):
        (tmp_path / f"{name}-png").mkdir()
        (tmp_path / f"{name}-shards").mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / f"{name}-png" / f"{i:04d}.png")
        for k, part in enumerate(np.split(pixels, (10, 33))):
            np.savez(tmp_path / f"{name}-shards" / f"images-{k:05d}-of-00003.npz", arr_0=part)
    rows = []
    for kind in ("shards", "png"):
        given = dict(samples=tmp_path / f"samples-{kind}", reference=tmp_path / f"reference-{kind}")
        fidelity(settings(files, tmp_path / kind, **given), RandomNetwork())
        rows += read(tmp_path / kind)["rows"]
    fidelity(settings(files, tmp_path / "npz"), RandomNetwork())
    assert rows == 2 * read(tmp_path / "npz")["rows"]


def test_the_first_images_can_be_taken(files, tmp_path):
    np.savez(tmp_path / "few.npz", arr_0=SAMPLES[:21])
    fidelity(settings(files, tmp_path / "few", samples=tmp_path / "few.npz"), RandomNetwork())
    fidelity(settings(files, tmp_path / "first", images=21), RandomNetwork())
    assert read(tmp_path / "first")["rows"] == read(tmp_path / "few")["rows"]
    with pytest.raises(ValueError, match="images must be at most the 45 of"):
        fidelity(settings(files, tmp_path / "more", images=46), RandomNetwork())


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
    done = RandomNetwork()
    fidelity(settings(files, tmp_path / "stopped"), done)
    assert done.asked == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from feature_network import RandomNetwork
from flowturbo import features
from flowturbo.evaluation.fid import Fidelity, fidelity
features.SHARD = 8
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
network = RandomNetwork(before=lambda asked: time.sleep(0.01))
given = dict(metrics=("fid", "sfid", "is", "precision", "recall"),
reference=folder / "reference.npz")
fidelity(Fidelity(**given, samples=folder / "samples.npz", batch_size=4, device="cpu", out=out),
network)
"""


def test_a_killed_evaluation_goes_on_to_the_same_bits(files, tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(files)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
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


def made(files: Path, out: Path, **changes) -> Fidelity:
    return settings(
        files,
        out,
        **{
            "samples": None,
            "model": "digits",
            "images": 24,
            "plans": ("H1R1",),
            "metrics": "fid,is",
            **changes,
        },
    )


def test_a_models_own_images_are_those_that_sample_writes(files, tmp_path):
    out = tmp_path / "samples.npz"
    words = (
        f"sample --plan H1R1 --num 24 --seed 3 --guidance 2 --batch-size 4 --device cpu --out {out}"
    )
    assert main(words.split()) == 0
    fidelity(
        settings(files, tmp_path / "file", samples=out, metrics=("fid", "is")), RandomNetwork()
    )
    fidelity(made(files, tmp_path / "made", seed=3, guidance=2.0), RandomNetwork())
    (expected,), (row,) = read(tmp_path / "file")["rows"], read(tmp_path / "made")["rows"]
    assert row == {**expected, "samples": "H1R1"}


def test_plans_of_files_are_told_apart(files, tmp_path):
    """Two fitted plans of the same letters."""
    for name, weight in (("a", 1.0), ("b", 0.8)):
        ft.Plan("LL", (0.0, 0.4, 1.0), weights=((0.4,), (weight, -0.3))).save(
            tmp_path / f"{name}.json"
        )
    plans = tuple(str(tmp_path / f"{name}.json") for name in "ab")
    fidelity(made(files, tmp_path / "out", plans=(*plans, "A2")), RandomNetwork())
    rows = {row["samples"]: row["fid"] for row in read(tmp_path / "out")["rows"]}
    assert len(rows) == len(set(rows.values())) == 3
    assert sorted(name[:3] for name in rows) == ["A2", "L2-", "L2-"]


def test_plans_and_metrics_may_be_added(files, tmp_path, few_a_file):
    fidelity(
        made(files, tmp_path / "at once", plans=("H1R1", "E2"), metrics=("fid", "is", "recall")),
        RandomNetwork(),
    )
    first, second, third = (RandomNetwork() for _ in range(3))
    fidelity(made(files, tmp_path / "bit by bit"), first)
    fidelity(made(files, tmp_path / "bit by bit", plans=("E2", "H1R1")), second)
    fidelity(made(files, tmp_path / "bit by bit", plans=("E2", "H1R1"), metrics="recall"), third)
    assert (first.asked, second.asked, third.asked) == (60 + 24, 24, 0)
    ours, theirs = (read(tmp_path / name)["rows"] for name in ("bit by bit", "at once"))
    for row in theirs:
        found = next(other for other in ours if other["samples"] == row["samples"])
        assert {k: found[k] for k in row} == row


def test_a_models_evaluation_goes_on_to_the_same_bits(files, tmp_path, few_a_file):
    fidelity(made(files, tmp_path / "undisturbed"), RandomNetwork())

    def fall_over(asked: int) -> None:
        if asked >= 60 + 12:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fidelity(made(files, tmp_path / "stopped"), RandomNetwork(before=fall_over))
    fidelity(made(files, tmp_path / "stopped"), RandomNetwork())
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
    fidelity(made(files, tmp_path), RandomNetwork())
    before = contents(tmp_path)
    if "reference" in changes:
        changes = {"reference": files / changes["reference"]}
    with pytest.raises(ValueError, match=r"other settings .*choose another folder as out") as error:
        fidelity(made(files, tmp_path, **changes), RandomNetwork())
    assert said in str(error.value)
    with pytest.raises(ValueError, match=r"network.seed was 0 and is now 1"):
        fidelity(made(files, tmp_path), RandomNetwork(seed=1))
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
    with pytest.raises(ValueError, match="is of an evaluation with other settings"):
        fidelity(settings(files, tmp_path / "a"), RandomNetwork())
    stored.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        fidelity(settings(files, tmp_path / "a"), RandomNetwork())
    (tmp_path / "a" / "report.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="holds no report of an evaluation"):
        fidelity(settings(files, tmp_path / "a"), RandomNetwork())


def test_the_report_names_all_that_a_rerun_needs(files, tmp_path):
    fidelity(made(files, tmp_path, metrics=ALL, plans=("H1R1", "E2")), RandomNetwork())
    text, results = (tmp_path / "report.md").read_text(), read(tmp_path)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert cells[0] == ["samples", "images", *TITLES.values()]
    for line, row in zip(cells[1:], results["rows"], strict=True):
        assert line[:3] == [row["samples"], "24", f"{row['fid']:.3f}"]
        assert line[4:] == [
            f"{row['is']:.2f} ± {row['is_std']:.2f}",
            f"{row['precision']:.4f}",
            f"{row['recall']:.4f}",
        ]
    model = Path(ft.__file__).parent / "bundled" / "digits.safetensors"
    for told in (
        "H1R1",
        "guidance 1.5",
        "guidance_channels 1",
        "seed 0",
        "noise of image i: flowturbo.noise(latent_shape, seed, [i])",
        "class of image i: i % 10",
        "127.5 x + 128",
        "batch_size 4",
        "dtype float32",
        f"torch {torch.__version__}",
        f"flowturbo {ft.__version__}",
        "device ",
        f"predictor_sha256 {sha256(model.read_bytes()).hexdigest()}",
        f"sha256 {results['reference']['sha256']}",
        "images 60",
        "name random",
        "model digits",
    ):
        assert told in text, told


def test_what_makes_figures_others_than_published_ones_is_said(files, tmp_path):
    fidelity(settings(files, tmp_path / "a"), RandomNetwork())
    text = (tmp_path / "a" / "report.md").read_text()
    assert "Published figures are of 50000 images, these of 45" in text
    assert "The last group of the inception score has 45 images instead of 5000" in text
    assert "The reference has no mu and sigma, so FID is to the Gaussian of its 60 images" in text
    assert "far too large" not in text
    fidelity(
        settings(files, tmp_path / "b", images=9, reference=files / "adm.npz"), RandomNetwork()
    )
    text = (tmp_path / "b" / "report.md").read_text()
    assert (
        "9 images don't determine a covariance of 9 features: FID and sFID are far too large"
        in text
    )
    assert "no mu and sigma" not in text
    (tmp_path / "jpeg").mkdir()
    for i in range(12):
        Image.fromarray(SAMPLES[i, :8, :8]).save(tmp_path / "jpeg" / f"{i}.jpg")
    fidelity(settings(files, tmp_path / "c", samples=tmp_path / "jpeg"), RandomNetwork())
    text = (tmp_path / "c" / "report.md").read_text()
    assert "Samples are stored with losses (.jpg)" in text
    assert "Samples have [8, 8] pixels, the reference [12, 12]" in text


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


def test_a_reference_of_gaussians_alone_serves_fid(files, tmp_path):
    pool = arrays(RandomNetwork(), REFERENCE)[0]
    np.savez(tmp_path / "alone.npz", mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    fidelity(
        settings(files, tmp_path / "a", reference=tmp_path / "alone.npz", metrics="fid,is"),
        RandomNetwork(),
    )
    fidelity(settings(files, tmp_path / "b", metrics="fid"), RandomNetwork())
    assert read(tmp_path / "a")["rows"][0]["fid"] == pytest.approx(
        read(tmp_path / "b")["rows"][0]["fid"], rel=1e-9
    )


def test_the_inception_score_needs_no_reference(files, tmp_path):
    fidelity(settings(files, tmp_path, reference=None, metrics="is"), RandomNetwork())
    assert read(tmp_path)["rows"][0]["is"] > 1
    assert read(tmp_path)["reference"] == {}


def test_every_metric_has_a_title_and_a_formula():
    assert list(TITLES) == list(METRICS) == list(ALL)


def test_the_command_asks_for_missing_weights_by_name(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    words = (
        f"evaluate --metrics fid,is --reference {files}/adm.npz --samples {files}/samples.npz "
        f"--out {tmp_path}/out"
    )
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert f"download {features.URL} (91 MB) and put it into {tmp_path / 'cache'}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_command_scores_by_inception(files, tmp_path, monkeypatch, capsys):
    """From the command line to the report, with random weights in a file of the published
    layout.
    """
    from inception_weights import random_weights

    path = tmp_path / "weights.pth"
    torch.save(random_weights(), path)
    monkeypatch.setattr(features, "SHA256", sha256(path.read_bytes()).hexdigest())
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
    assert results["network"]["weights_sha256"] == features.SHA256
    assert results["network"]["code"].startswith("torch-fidelity 0.")
    network = features.Inception(path)
    reference, samples = (
        network.read(x).pool.double().numpy() for x in (REFERENCE[:9], SAMPLES[:7])
    )
    (row,) = results["rows"]
    assert row["precision"] == pytest.approx(inside(samples, reference), abs=1e-12)
    assert row["recall"] == pytest.approx(inside(reference, samples), abs=1e-12)


def test_without_metrics_the_command_is_what_it_was(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert "--classifier-steps" in said
    assert "--metrics" in said
    with pytest.raises(SystemExit):
        main(["evaluate", "--metrics=fid", "--help"])
    said = capsys.readouterr().out
    assert "--reference" in said
    assert "--classifier-steps" not in said
