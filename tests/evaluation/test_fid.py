"""FID as published, by a small random network on small images: right figures, honest reports."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_network import RandomNetwork
from fid_runs import ALL, REFERENCE, SAMPLES, images, inside, of_digits, read, settings
from PIL import Image

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.evaluation.fid import METRICS, fidelity
from flowturbo.evaluation.fid_report import TITLES
from flowturbo.models.digests import model_digest


def fid_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    (m, s), (w, t) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return float((m - w) @ (m - w) + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real))


def arrays(network: RandomNetwork, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(x.double().numpy() for x in network.read(pixels))


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
        folders = dict(
            samples=tmp_path / f"samples-{kind}", reference=tmp_path / f"reference-{kind}"
        )
        fidelity(settings(files, tmp_path / kind, **folders), RandomNetwork())
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


def test_a_models_own_images_are_those_that_sample_writes(files, tmp_path):
    out = tmp_path / "samples.npz"
    words = (
        "sample --model digits --plan H1R1 --num 24 --seed 3 --guidance 2 --batch-size 4 "
        f"--device cpu --out {out}"
    )
    assert main(words.split()) == 0
    fidelity(
        settings(files, tmp_path / "file", samples=out, metrics=("fid", "is")), RandomNetwork()
    )
    fidelity(of_digits(files, tmp_path / "made", seed=3, guidance=2.0), RandomNetwork())
    (expected,), (row,) = read(tmp_path / "file")["rows"], read(tmp_path / "made")["rows"]
    assert row == {**expected, "samples": "H1R1"}


def test_plans_of_files_are_told_apart(files, tmp_path):
    """Two fitted plans of the same letters."""
    for name, weight in (("a", 1.0), ("b", 0.8)):
        ft.Plan("LL", (0.0, 0.4, 1.0), weights=((0.4,), (weight, -0.3))).save(
            tmp_path / f"{name}.json"
        )
    plans = tuple(str(tmp_path / f"{name}.json") for name in "ab")
    fidelity(of_digits(files, tmp_path / "out", plans=(*plans, "A2")), RandomNetwork())
    rows = {row["samples"]: row["fid"] for row in read(tmp_path / "out")["rows"]}
    assert len(rows) == len(set(rows.values())) == 3
    assert sorted(name[:3] for name in rows) == ["A2", "L2-", "L2-"]


def test_the_report_names_all_that_a_rerun_needs(files, tmp_path):
    fidelity(of_digits(files, tmp_path, metrics=ALL, plans=("H1R1", "E2")), RandomNetwork())
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
    for words in (
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
        f"predictor_sha256 {model_digest(model)}",
        f"sha256 {results['reference']['sha256']}",
        "images 60",
        "name random",
        "model digits",
    ):
        assert words in text, words


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
