"""A folder of small images, and the VAE that encodes them."""

from pathlib import Path

import pytest
from encoding import Halved, make_images

import flowturbo.data.encode as module


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Halved:
    """What any vae's name stands for in this test."""
    vae = Halved()
    monkeypatch.setattr(module, "load_vae", lambda name, device, dtype: vae)
    return vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images in three classes, of several sizes."""
    return make_images(tmp_path / "images", seed=0)
