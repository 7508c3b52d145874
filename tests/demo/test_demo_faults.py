"""The demo after a request that failed, or that nobody waits for."""

from __future__ import annotations

import math

import pytest
import torch

import flowturbo as ft
from flowturbo.demo.session import DemoSession, Request

ASKED = Request("H1P2R1", "E3", "cycle", 4, seed=7, guidance=1.5)


@pytest.fixture
def session():
    session = DemoSession(ft.load("digits", device="cpu"), {"H1P2R1": None, "E3": None})
    yield session
    session.close()


def test_images_that_are_not_finite_are_named_and_the_next_request_is_served(session):
    row = session.model.predictor.y_embedder.embedding_table.weight[2]
    before = row.clone()
    with torch.no_grad():
        row[0] = math.nan
    for ask in (
        lambda: list(session.sample(ASKED)),
        lambda: session.picture(ASKED, 2),
        lambda: session.curve(1.5),
    ):
        with pytest.raises(FloatingPointError, match="not finite"):
            ask()
    with torch.no_grad():
        row.copy_(before)
    shown = list(session.sample(ASKED))[-1]
    assert shown.a.images.equal(
        ft.sample(session.model, "H1P2R1", [0, 1, 2, 3], guidance=1.5, seed=7, output="uint8")
    )


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError, KeyError])
def test_an_error_of_the_model_reaches_its_visitor_alone(session, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(
            session.model.vae, "decode", lambda latents: (_ for _ in ()).throw(error("x"))
        )
        with pytest.raises(error):
            list(session.sample(ASKED))
    assert list(session.sample(ASKED))[-1].rms is not None


def test_a_visitor_who_leaves_stops_the_work_and_the_next_is_served(session):
    for _ in range(3):
        shown = session.sample(ASKED)
        next(shown)
        shown.close()
    assert list(session.sample(ASKED))[-1].rms is not None
    assert session._worker._work_queue.qsize() == 0
