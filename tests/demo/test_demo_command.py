"""The demo's command: the plans it offers and what it refuses."""

from __future__ import annotations

import socket

import pytest
from tiny import tiny_model

from flowturbo.cli import demo
from flowturbo.cli.demo import Demo, plans_for
from flowturbo.cli.main import main


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(port=70000), "port must be from 0 to 65535, got 70000"),
        (dict(plans=()), "plans must name at least one"),
        (dict(max_images=0), "max_images must be at least 1"),
        (dict(max_steps=0), "max_steps must be at least 1"),
        (dict(guidance=float("nan")), "guidance must be finite"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Demo(**changes)


@pytest.mark.parametrize(
    "plans, message",
    [
        (("E2", "E2"), "plans must have different names, got 'E2' twice"),
        (("H1p3",), "plan must look like"),
        (("nowhere.json",), "nowhere.json can't be read"),
        (("H65",), "plans must have at most max_steps = 64 steps, got 65 in 'H65'"),
        (("H1R1",), "plans must do without refiner steps where there is no refiner, got 'H1R1'"),
    ],
)
def test_plans_that_cannot_be_offered_are_refused(plans, message):
    with pytest.raises(ValueError, match=message):
        plans_for(Demo(plans=plans), tiny_model(refiner=False))


def test_without_a_refiner_other_plans_are_offered():
    assert set(plans_for(Demo(), tiny_model(refiner=False))) == {"H8", "H1P5", "E8", "A8"}
    assert set(plans_for(Demo(), tiny_model())) == set(demo.PLANS)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "org/pipeline"], "model must be a model of classes for the demo"),
        (["--model", "nowhere.pt"], "nowhere.pt does not exist"),
        (
            ["--host", "no.such.host.invalid"],
            "host and port can't be listened at: no.such.host.invalid, 7860",
        ),
        (["--port", "BUSY"], "host and port can't be listened at: 127.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(words, said, capsys, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo, "serve", lambda *_: pytest.fail("it was served"))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        assert main(["demo", *(port if word == "BUSY" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("flowturbo: error: ")
    assert error.count("\n") == 1


def test_a_missing_gradio_is_named_with_its_cure(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "serve", lambda *_: pytest.fail("it was served"))
    assert main(["demo"]) == 2
    assert (
        capsys.readouterr().err
        == "flowturbo: error: the demo needs gradio: pip install 'flowturbo[demo]'\n"
    )
