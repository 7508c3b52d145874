"""Latents and a teacher to train with."""

from pathlib import Path

import numpy as np
import pytest
from training_runs import CLASSES, tiny

from flowturbo.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """40 latents of 2 x 4 x 4 in 3 classes, each class a pattern with noise on it."""
    rng = np.random.default_rng(1)
    labels = np.arange(40) % CLASSES
    patterns = rng.standard_normal((CLASSES, 2, 4, 4))
    path = tmp_path_factory.mktemp("data") / "latents.npz"
    np.savez(
        path,
        latents=(patterns[labels] + 0.1 * rng.standard_normal((40, 2, 4, 4))).astype(np.float32),
        labels=labels,
    )
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data) -> Path:
    return train(
        tiny(
            tmp_path_factory.mktemp("teacher"),
            data,
            steps=150,
            hidden=32,
            depth=3,
            batch_size=16,
            lr=5e-3,
            save_every=150,
        )
    )
