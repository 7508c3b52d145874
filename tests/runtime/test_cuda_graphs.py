"""Captures of whole runs, with a recorder that needs no GPU: their keys, buffers and bounds."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from fake_recorder import LABELS, Fake, captured_model, plain
from tiny import CONFIG, tiny_model
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.integrations.transformer import Graphed
from flowturbo.models.vae import Pixels
from flowturbo.runtime.cuda_graphs import Captures, Key


def test_the_first_run_is_eager_the_second_is_captured_and_then_it_is_replayed():
    model, recorder = captured_model()
    seen = []
    for seed in range(4):
        result = ft.sample(model, "H1P1R1", LABELS, guidance=2.0, seed=seed)
        assert result.equal(plain("H1P1R1", LABELS, guidance=2.0, seed=seed))
        seen.append((recorder.recorded, recorder.replayed))
    assert seen == [(0, 0), (1, 3), (1, 4), (1, 5)]  # two replays are timed
    [capture] = model.captures.report()
    assert (capture.hits, capture.memory, capture.eager_seconds, capture.replay_seconds) == (
        3,
        1 << 20,
        0.25,
        0.25,
    )


def test_no_label_seed_noise_or_scale_makes_a_new_capture():
    model, recorder = captured_model()
    for labels, seed, guidance in (
        (LABELS, 0, 2.0),
        ([4, 4, 4], 1, 1.5),
        (LABELS, 2, 0.0),
        ([0, 9, 5], 3, -1.0),
    ):
        result = ft.sample(model, "H1R1", labels, guidance=guidance, seed=seed)
        assert result.equal(plain("H1R1", labels, guidance=guidance, seed=seed))
    noise = torch.randn(3, *model.latent_shape)
    assert ft.sample(model, "H1R1", LABELS, guidance=3.0, noise=noise).equal(
        plain("H1R1", LABELS, guidance=3.0, noise=noise)
    )
    assert recorder.recorded == 1


def test_everything_that_changes_the_work_makes_a_new_capture():
    model, recorder = captured_model(limit=100)
    model.vae = Pixels()
    model.vae.decode = lambda latents: latents.mul(20).to(torch.uint8).permute(0, 2, 3, 1)
    base = dict(plan="H1R1", labels=LABELS, guidance=2.0, seed=0)
    changes = [
        {},
        dict(plan="H1P1"),
        dict(plan=ft.Plan.parse("H1R1", shift=2.0)),
        dict(plan=ft.Plan.parse("H1R1", guidance_interval=(0.0, 0.5))),
        dict(guidance=1.0),
        dict(guidance_channels=2),
        dict(labels=[1]),
        dict(batch_size=2),
        dict(output="uint8"),
        dict(seed=None, noise=torch.zeros(3, *model.latent_shape, dtype=torch.float64)),
    ]
    for number, change in enumerate(changes, 1):
        for _ in range(3):
            ft.sample(model, **{**base, **change})
        assert recorder.recorded == number, change
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWTURBO_BACKEND", "reference")
        for _ in range(3):
            ft.sample(model, **base)
    assert recorder.recorded == len(changes) + 1
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            ft.sample(model, **base)
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorder.recorded == len(changes) + 2


def test_settings_of_arithmetic_make_a_new_capture_of_a_network_too():
    class Doubling(nn.Module):
        def forward(self, x: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (2 * x,)

    network, captures = Doubling(), Captures(recorder=Fake())
    Graphed(network, captures)
    with torch.no_grad():
        for on in (False, True):
            torch.use_deterministic_algorithms(on)
            try:
                for _ in range(3):
                    assert network(torch.ones(2), return_dict=False)[0].tolist() == [2.0, 2.0]
            finally:
                torch.use_deterministic_algorithms(False)
    assert captures.recorder.recorded == 2


def test_results_of_earlier_replays_stay_whole():
    model, _ = captured_model()
    results = [
        ft.sample(model, plan, LABELS, seed=seed) for seed in range(5) for plan in ("H1R1", "E2")
    ]
    truth = [plain(plan, LABELS, seed=seed) for seed in range(5) for plan in ("H1R1", "E2")]
    assert all(a.equal(b) for a, b in zip(results, truth, strict=True))


def test_batches_of_one_job_are_replayed():
    model, recorder = captured_model()
    result = ft.sample(model, "H1R1", list(range(10)), seed=0, batch_size=3)
    assert result.equal(plain("H1R1", list(range(10)), seed=0, batch_size=3))
    assert (recorder.recorded, model.captures.report()[0].hits) == (1, 3)


def test_decoding_is_in_the_capture():
    model, recorder = captured_model(config=replace(CONFIG, channels=1))
    model.vae = Pixels()
    for seed in range(3):
        images = ft.sample(model, "H1R1", LABELS, seed=seed, output="uint8")
        latents = ft.sample(tiny_model(replace(CONFIG, channels=1)), "H1R1", LABELS, seed=seed)
        assert images.equal(Pixels().decode(latents))
    assert recorder.recorded == 1
    assert model.captures.report()[0].result.dtype == torch.uint8


def test_the_bar_runs_on_with_captures(capsys):
    model, _ = captured_model()
    for _ in range(3):
        ft.sample(model, "E3", list(range(6)), seed=0, batch_size=2, progress=True)
    assert "/9 " in capsys.readouterr().err


def test_the_least_recently_used_capture_goes_first_and_those_made_ahead_last():
    model, recorder = captured_model(limit=3)
    ft.compile(model, "E1", 3, guided=False)
    for plan in ("E2", "E2", "E3", "E3", "E2", "E4", "E4"):
        ft.sample(model, plan, LABELS, seed=0)
    assert [str(c.key.what.plan) for c in model.captures.report()] == ["E1", "E2", "E4"]
    recorded = recorder.recorded
    ft.sample(model, "E3", LABELS, seed=0)  # met before: captured at once
    assert recorder.recorded == recorded + 1
    assert [str(c.key.what.plan) for c in model.captures.report()] == ["E1", "E4", "E3"]


def test_a_limit_of_zero_captures_nothing():
    model, recorder = captured_model(limit=0)
    for _ in range(3):
        ft.sample(model, "E1", LABELS, seed=0)
    assert recorder.recorded == 0


def test_what_was_met_is_forgotten_in_the_end():
    captures, recorder = Captures(limit=1, recorder=Fake()), nn.Identity()
    for n in range(1000):
        captures.run(Key(n, 1), lambda x: x, {"x": torch.zeros(1)}, [recorder])
    assert len(captures._met) < 100


def test_clearing_gives_memory_back():
    model, recorder = captured_model()
    ft.compile(model, "E1")
    released = recorder.released
    model.captures.clear()
    assert model.captures.report() == []
    assert recorder.released > released


def test_a_capture_that_was_given_up_holds_no_memory_whoever_holds_it():
    model, recorder = captured_model()
    [capture] = ft.compile(model, "E1")
    buffers = [weakref.ref(tensor) for tensor in capture.inputs.values()]
    whole = []
    recorder.settle = lambda: whole.append(
        all(buffer() is not None for buffer in buffers)
    )  # the device may still be using them
    model.captures.clear()
    recorder.buffers.clear()
    assert whole == [True]
    assert [buffer() for buffer in buffers] == [None] * len(buffers)
    assert (capture.inputs, capture.result.numel(), capture.watched.kept, capture.memory) == (
        {},
        0,
        [],
        1 << 20,
    )
    with pytest.raises(RuntimeError, match="was given up"):
        capture.replay()
