"""What is sampled, and how trial runs shorten it."""

from __future__ import annotations

import sys

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import subjects


def test_trial_runs_are_shorter_and_say_so(monkeypatch):
    assert subjects.subject(64, 1, False).about == {"depth": 2, "decoder": "small"}
    monkeypatch.setenv(subjects.DEPTH, "3")
    s = subjects.subject(64, 1, False)
    assert s.about["depth"] == len(s.predictor.blocks) == 3
    for text in ("0", "-1", "x", "1.5"):
        monkeypatch.setenv(subjects.DEPTH, text)
        with pytest.raises(
            ValueError,
            match=f"{subjects.DEPTH} must be a number of blocks, at least 1, got '{text}'",
        ):
            subjects.subject(64, 1, False)
    monkeypatch.delenv(subjects.DEPTH)
    monkeypatch.setenv(subjects.DECODER, "tiny")
    with pytest.raises(
        ValueError, match=f"{subjects.DECODER} must be 'full' or 'small', got 'tiny'"
    ):
        subjects.subject(64, 1, False)


def test_the_decoder_of_a_gpu_is_the_published_one_unless_a_small_one_is_asked_for(monkeypatch):
    asked = []
    cpu = subjects.networks(64, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subjects, "networks", lambda *arguments: asked.append(arguments) or cpu)
    assert subjects.subject(64, 1, True).about["decoder"] == "full"
    monkeypatch.setenv(subjects.DECODER, "small")
    monkeypatch.setenv(subjects.DEPTH, "5")
    assert subjects.subject(64, 1, True).decoder == "small"
    assert asked == [(64, True, None, "full"), (64, True, 5, "small")]
