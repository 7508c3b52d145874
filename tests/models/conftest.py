"""A folder of a small autoencoder, and a machine without a network."""

from pathlib import Path

import pytest
from vae_folders import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("vae") / "sd")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any question to the hub fails the test."""
    hub = pytest.importorskip("huggingface_hub")

    def asked(*args: object, **kwargs: object) -> None:
        pytest.fail(f"the hub was asked: {args}")

    monkeypatch.setattr(hub, "model_info", asked)
