"""A small random model and its evaluation; images for FID."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from class_runs_small import networks_in, sets_in
from feature_network import RandomNetwork
from fid_runs import REFERENCE, SAMPLES, images
from quality_runs import DIGITS, settings
from tiny import random_sit

import flowturbo.evaluation.quality as module
from flowturbo.evaluation import class_quality, inception
from flowturbo.evaluation.quality import evaluate
from flowturbo.models.checkpoint import save_sit


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = folder / "predictor.safetensors", folder / "refiner.safetensors"
    save_sit(paths[0], random_sit(DIGITS, 0))
    save_sit(paths[1], random_sit(DIGITS.refiner(), 1))
    return paths


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "new" / "folder"
    assert evaluate(settings(models, out)) == out / "quality.md"
    return out


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(module, "plot_quality", lambda results, path: path.write_bytes(b"a plot"))


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


@pytest.fixture
def few_a_file(monkeypatch):
    monkeypatch.setattr(inception, "SHARD", 8)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> tuple[Path, Path]:
    """The files of a small predictor of three classes and of its refiner."""
    return networks_in(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    """The files of its training set and of held-out pictures."""
    return sets_in(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def no_class_plot(monkeypatch):
    """Evaluations on a training set draw nothing, which takes seconds."""
    monkeypatch.setattr(
        class_quality, "plot_classes", lambda results, path: path.write_bytes(b"a plot")
    )
