"""compile(): captures ahead of time, and the summary of what they gain."""

from __future__ import annotations

import pytest
import torch
from fake_recorder import LABELS, Fake, captured_model, plain
from tiny import tiny_model

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import Captures, Key


def test_compile_captures_every_plan_with_every_batch_size():
    model, recorder = captured_model()
    captures = ft.compile(model, ["H1R1", ft.Plan.parse("E2")], [1, 4])
    assert [(str(c.key.what.plan), c.key.size) for c in captures] == [
        ("H1R1", 1),
        ("H1R1", 4),
        ("E2", 1),
        ("E2", 4),
    ]
    assert recorder.recorded == 4
    assert [c.precaptured for c in model.captures.report()] == [True] * 4
    assert ft.compile(model, "E2", 4) == captures[3:]
    assert recorder.recorded == 4
    assert ft.sample(model, "E2", LABELS, guidance=2.0, seed=1).equal(
        plain("E2", LABELS, guidance=2.0, seed=1, batch_size=4)
    )
    assert (recorder.recorded, captures[3].hits) == (4, 1)


def test_a_run_that_compiles_is_not_the_one_that_is_timed():
    captures, calls, timed = Captures(recorder=Fake()), [], []
    seconds = captures.recorder.seconds
    captures.recorder.seconds = lambda run: timed.append(len(calls)) or seconds(run)
    captures.precapture(Key("it", 1), lambda x: calls.append(1) or x + 1, {"x": torch.zeros(1)}, [])
    assert timed[0] == 1


def test_without_a_batch_size_the_smallest_capture_that_holds_all_is_taken():
    model, recorder = captured_model()
    two, four = ft.compile(model, "E1", [2, 4], guided=False)
    for count, hits in ((1, (1, 0)), (2, (2, 0)), (3, (2, 1)), (4, (2, 2)), (5, (2, 2))):
        result = ft.sample(model, "E1", list(range(count)), seed=0)
        assert len(result) == count
        assert result.equal(
            plain("E1", list(range(count)), seed=0, batch_size={1: 2, 3: 4}.get(count))
        )
        assert (two.hits, four.hits) == hits
    ft.sample(model, "E1", [1], seed=0, batch_size=1)
    assert (two.hits, four.hits) == (2, 2)
    ft.sample(model, "E1", [1], seed=0, guidance=2.0)  # guided runs are others
    assert (two.hits, four.hits) == (2, 2)
    assert recorder.recorded == 2


def test_compile_without_graphs_runs_once_and_says_so():
    model = tiny_model()
    calls = []
    original = model.predictor.evaluate
    model.predictor.evaluate = lambda *args: calls.append(1) or original(*args)
    assert ft.compile(model, "H1", [1, 2]) == []
    assert len(calls) == 4
    assert ft.summary(model) == "nothing is captured"


def test_compile_shows_a_bar_when_asked(capsys):
    ft.compile(tiny_model(), ["E1", "E2"], [1, 2], progress=True)
    assert "/4 " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, kind, said",
    [
        (dict(plans=[]), ValueError, "plans and batch_sizes must name at least one"),
        (dict(plans="R1"), ValueError, "R needs the velocity"),
        (dict(batch_sizes=[]), ValueError, "plans and batch_sizes must name at least one"),
        (dict(batch_sizes=[2, 0]), ValueError, "batch_sizes must be at least 1, got 0"),
        (dict(batch_sizes=[True]), TypeError, "batch_sizes must be a whole number, got True"),
        (dict(output="uint8"), ValueError, "needs a model that was loaded with a vae"),
        (dict(guidance_channels=9), ValueError, "guidance_channels must be from 1 to 4, got 9"),
        (
            dict(batch_sizes=range(1, 10)),
            ft.CaptureError,
            "there are 8 captures made ahead already: raise model.captures.limit",
        ),
    ],
)
def test_what_compile_refuses(arguments, kind, said):
    model, _ = captured_model()
    with pytest.raises(kind, match=said):
        ft.compile(**{"model": model, "plans": "E1", **arguments})


def test_the_summary_tells_cost_and_gain():
    model, recorder = captured_model()
    ft.compile(model, "H1R1", 3)
    ft.sample(model, "H1R1", LABELS, guidance=2.0, seed=0)
    recorder.failures = [RuntimeError("no luck")]
    ft.sample(model, "E1", LABELS, seed=0)
    with pytest.warns(UserWarning, match="no luck"):
        ft.sample(model, "E1", LABELS, seed=0)
    first, second = ft.summary(model).splitlines()
    assert first.startswith(
        "plan H1R1 with guidance to latents, batch 3: 250.00 ms a replay, 250.00 ms without a "
        "graph (1.00 times)"
    )
    assert "1 MiB" in first
    assert first.endswith("ahead of time, replayed 1 times")
    assert second == (
        "plan E1 without guidance to latents, batch 3: without a graph, since capturing plan E1 "
        "without guidance to latents "
        "failed (RuntimeError: no luck)"
    )
