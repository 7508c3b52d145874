"""Sets of images that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from generated_sets import finish, make

import flowturbo as ft


@pytest.fixture(scope="module")
def digits() -> ft.FlowModel:
    return ft.load("digits", device="cpu")


@pytest.fixture(scope="module")
def image_set(digits: ft.FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that nothing disturbed."""
    out = tmp_path_factory.mktemp("sets") / "set"
    make(digits, out)
    return out


@pytest.fixture(scope="module")
def larger_set(digits: ft.FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes: 12 shards, the last of 2 images."""
    out = tmp_path_factory.mktemp("larger") / "set"
    finish(digits, out)
    return out
