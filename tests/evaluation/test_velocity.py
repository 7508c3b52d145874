"""How the velocity turns along a trajectory, for fields where that is known."""

import cmath
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import flowturbo as ft
from flowturbo.evaluation import velocity
from flowturbo.evaluation.velocity import InspectVelocity, inspect_velocity, trajectory_velocities


def handmade(predictor) -> ft.FlowModel:
    return ft.FlowModel(predictor, (1, 1, 2), 10, 10, 1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("guidance, rate", [(1.0, 0.7), (1.5, 1.05)])
def test_velocities_are_those_at_the_states_of_the_trajectory(guidance, rate):
    """dx/dt = 0.7 x with a label, 0 without: guided by s, Heun's states grow by 1 + h + h^2/2 with
    h = 0.7 s / steps.
    """
    steps, labels, noise = 8, torch.arange(5), ft.noise((1, 1, 2), 0, range(5))
    model = handmade(lambda x, t, y, v=None: 0.7 * x * (y < 10).view(-1, 1, 1, 1))
    v = trajectory_velocities(model, ft.Plan.parse(f"H{steps}"), labels, noise, guidance)
    h = rate / steps
    expected = (
        rate
        * noise
        * torch.tensor([(1 + h + h * h / 2) ** k for k in range(steps + 1)]).view(-1, 1, 1, 1, 1)
    )
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)


def test_velocity_that_turns_at_a_known_rate(tmp_path, monkeypatch):
    """v = exp((a + iw) t): its relative change over dt is |exp((a + iw) dt) - 1|, its cosine with
    v(s) is cos w(t - s).
    """
    a, w, steps = 0.8, 2.0, 40

    def predictor(x, t, y, v=None):
        return ((a * t).exp() * torch.stack([(w * t).cos(), (w * t).sin()])).T.view(-1, 1, 1, 2)

    monkeypatch.setattr(velocity, "load", lambda *_, **__: handmade(predictor))
    path = inspect_velocity(InspectVelocity(out=tmp_path, images=7, batch_size=3, steps=steps))
    assert path == tmp_path / "velocity.png"
    assert {p.name for p in tmp_path.iterdir()} == {"velocity.json", "velocity.png"}
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 5
    results = json.loads((tmp_path / "velocity.json").read_text())
    times = np.array(results["times"])
    np.testing.assert_allclose(times, np.arange(steps + 1) / steps)
    for part, scale in (("change", 1), ("rate", steps)):
        for kind in ("mean", "p10", "p90"):
            np.testing.assert_allclose(
                results[part][kind],
                np.full(steps, scale * abs(cmath.exp((a + w * 1j) / steps) - 1)),
                rtol=1e-4,
            )
    assert list(results["cosine"]) == ["0", "0.25", "0.5", "0.75", "1"]
    for s, cosine in results["cosine"].items():
        np.testing.assert_allclose(cosine, np.cos(w * (times - float(s))), atol=1e-5)


def test_inspected_velocity_does_not_depend_on_batches(models, tmp_path, monkeypatch):
    monkeypatch.setattr(velocity, "plot_velocity", lambda *_: None)
    curves = []
    for size in (3, 12):
        inspect_velocity(
            InspectVelocity(
                out=tmp_path / str(size), model=str(models[0]), images=12, batch_size=size, steps=6
            )
        )
        curves.append(json.loads((tmp_path / str(size) / "velocity.json").read_text()))
    for part, kind in (("rate", "mean"), ("rate", "p90"), ("change", "p10"), ("cosine", "0")):
        np.testing.assert_allclose(curves[0][part][kind], curves[1][part][kind], rtol=1e-3)
    assert curves[0]["rate"]["p90"][2] > curves[0]["rate"]["p10"][2] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps must be at least 1"),
        (dict(steps=1001), "a plan must have 1 to 1000 steps"),
        (dict(images=0), "images must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(guidance=math.inf), "guidance must be finite"),
        (dict(seed=2**63), "seed must be from 0"),
    ],
)
def test_bad_inspections_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InspectVelocity(**changes)


def test_a_velocity_of_zero_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        velocity, "load", lambda *_, **__: handmade(lambda x, t, y, v=None: torch.zeros_like(x))
    )
    with pytest.raises(ValueError, match="has a velocity of zero: is it trained"):
        inspect_velocity(InspectVelocity(out=tmp_path / "out", images=2, steps=3))
    assert not (tmp_path / "out").exists()
