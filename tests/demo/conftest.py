"""The demo's model."""

from __future__ import annotations

import pytest

import flowturbo as ft


@pytest.fixture(scope="module")
def model() -> ft.FlowModel:
    return ft.load("digits", device="cpu")
