"""Networks and autoencoders that use a buffer again, and callers that write to what they got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_recorder import Fake
from tiny import tiny_model
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.models.flow_model import AdaptiveNetwork
from flowturbo.models.vae import Pixels
from flowturbo.sampling.velocity_field import field_of

PLANS = ["H2", "H1P2", "A4", "B4", "H1P1R2", "H1P1S2", "C4", "X3"]
LABELS = [1, 2, 3]


class Buffered(nn.Module):
    """A network that writes to its inputs, and returns one buffer at every call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.buffers = network, {}

    def kept(self, out: Tensor) -> Tensor:
        return self.buffers.setdefault(out.shape, torch.empty_like(out)).copy_(out)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        out = self.kept(self.network(x, t, y, v))
        for given in (x, t, y, v):
            if given is not None:
                given.fill_(7)
        return out


class BufferedAdaptive(Buffered):
    """The same for a network whose modulations are computed ahead."""

    @property
    def modulation_width(self) -> int:
        return self.network.modulation_width

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return self.network.condition(t, y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        return self.network.modulations(c)

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        out = self.kept(self.network.evaluate(x, modulations, v))
        for given in (x, v):
            if given is not None:
                given.fill_(7)
        return out


def wrapped(kind: type[Buffered]) -> ft.FlowModel:
    model = tiny_model()
    return replace(model, predictor=kind(model.predictor), refiner=kind(model.refiner))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [Buffered, BufferedAdaptive])
def test_networks_may_use_their_buffers_again(kind, plan, guidance):
    model = wrapped(kind)
    assert isinstance(model.predictor, AdaptiveNetwork) == (kind is BufferedAdaptive)
    noise = torch.randn(3, *model.latent_shape)
    before = noise.clone()
    options = dict(labels=LABELS, guidance=guidance, noise=noise)
    expected = ft.sample(tiny_model(), plan, **options)
    first = ft.sample(model, plan, **options)
    kept = first.clone()
    ft.sample(model, plan, LABELS, guidance=guidance, seed=9)
    error = (first - expected).norm() / expected.norm()
    assert error < 1e-5
    assert first.equal(kept)
    assert noise.equal(before)


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("kind", [Buffered, BufferedAdaptive])
def test_a_velocity_alone_is_no_buffer_of_the_networks(kind, guidance):
    """As the curve of velocities keeps them, call after call."""
    model, plan = wrapped(kind), ft.Plan.parse("A4")
    conditions = {"labels": torch.tensor(LABELS)}
    field = field_of(model, plan, conditions, guidance, model.guidance_channels)
    first = field.predict(torch.randn(3, *model.latent_shape), 0.25)
    kept = first.clone()
    field.predict(torch.randn(3, *model.latent_shape), 0.5)
    assert first.equal(kept)


@pytest.mark.parametrize("captured", [False, True])
def test_what_the_caller_gave_and_got_is_nobody_elses(captured):
    model = ft.load("digits", device="cpu")
    if captured:
        model.captures.recorder = Fake()
    noise, latents = torch.randn(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
    labels, pixels = torch.tensor(LABELS), np.zeros((3, 8, 8, 3), np.uint8)
    mask = np.ones((8, 8), bool)
    given = [noise, labels, latents, torch.from_numpy(pixels), torch.from_numpy(mask)]
    before = [g.clone() for g in given]
    calls = [
        lambda: ft.sample(model, "H1P1", labels, noise=noise),
        lambda: ft.sample(model, "H1P1", labels, noise=noise, output="uint8"),
        lambda: ft.edit(model, "E2", latents, labels, noise=noise, output="latents"),
        lambda: ft.edit(model, "E2", pixels, labels, noise=noise),
        lambda: ft.inpaint(model, "E2", pixels, mask, labels, noise=noise),
        lambda: ft.inpaint(model, "E2", latents, mask, labels, noise=noise, output="latents"),
        lambda: ft.sample(lambda x, t: x * t, "H1P1", noise=noise),
    ]
    for call in calls:
        for _ in range(2):  # the second one is captured
            expected = call().clone()
        results = [call(), call()]
        storages = {t.untyped_storage().data_ptr() for t in (*given, *results)}
        assert len(storages) == len(given) + 2
        results[0].fill_(3)
        for result in (results[1], call()):
            assert result.equal(expected)
    assert all(a.equal(b) for a, b in zip(given, before, strict=True))


def test_the_channels_of_grey_images_are_memory_of_their_own():
    model = ft.load("digits", device="cpu")
    for images in (
        ft.sample(model, "E1", [1, 2], seed=0, output="uint8"),
        model.decode(torch.zeros(2, 1, 8, 8)),
        Pixels().decode(torch.zeros(2, 1, 8, 8)),
    ):
        before = images.clone()
        images[..., 0] = 5
        assert images[..., 1:].equal(before[..., 1:])


@pytest.mark.parametrize("plan", ["H1P2", "B3", "H1R2"])
def test_a_callback_may_write_to_what_it_is_shown(plan):
    model, shown = tiny_model(), []

    def spoil(info: ft.StepInfo) -> None:
        shown.append((info.x, info.x.clone()))
        info.denoised.fill_(3)

    expected = ft.sample(model, plan, LABELS, guidance=2.0, seed=0)
    assert ft.sample(model, plan, LABELS, guidance=2.0, seed=0, callback=spoil).equal(expected)
    assert all(x.equal(copy) for x, copy in shown)

    def erase(info: ft.StepInfo) -> None:
        info.x.zero_()

    assert ft.sample(model, plan, LABELS, guidance=2.0, seed=0, callback=erase).equal(expected)
