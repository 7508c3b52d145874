"""Editing and inpainting: where they start and what they keep."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from edits import CONFIG_SHAPE, GREY, LABELS, half, pictures, pixel_model
from fake_recorder import captured_model
from tiny import tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo.models.vae import Pixels
from flowturbo.solver.path import on_path


class Blocks(Pixels):
    """An autoencoder of factor 2: a latent is the mean of its four pixels."""

    factor = 2

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        latents, _ = super().encode(images)
        return torch.nn.functional.avg_pool2d(latents, 2), None

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("plan", ["H1P2R1", "P2", "C3", "E4"])
def test_an_edit_is_the_whole_plan_from_the_path_on(plan):
    """By hand: a plain function, on a clock that starts at 0, integrates the same equation."""
    model = tiny_model(refiner="R" in plan, dtype=torch.float64)
    source, noise = (
        torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(s))
        for s in (1, 2)
    )
    got = ft.edit(model, plan, source, LABELS, strength=0.7, noise=noise, output="latents")
    if "R" not in plan:
        y = torch.tensor(LABELS)

        def v(x: Tensor, t: Tensor) -> Tensor:  # dx/ds with t = 0.3 + 0.7 s
            return 0.7 * model.predictor(
                x, torch.full((3,), 0.3 + 0.7 * float(t), dtype=torch.float64), y
            )

        expected = ft.sample(v, plan, noise=on_path(source, noise, 0.3).double())
        assert_close(got, expected, 1e-5)
    seen = []
    ft.edit(
        model,
        plan,
        source,
        LABELS,
        strength=0.7,
        noise=noise,
        output="latents",
        callback=seen.append,
    )
    assert len(seen) == len(ft.Plan.parse(plan))
    assert [info.t for info in seen] == pytest.approx(
        [0.3 + 0.7 * t for t in ft.Plan.parse(plan).grid[1:]]
    )


def test_full_strength_forgets_the_image_and_little_keeps_it():
    model = tiny_model()
    source = torch.randn(3, *model.latent_shape)
    forgotten = ft.edit(model, "H1R1", source, LABELS, strength=1.0, seed=5, output="latents")
    assert_close(forgotten, ft.sample(model, "H1R1", LABELS, seed=5), 1e-6)
    distances = [
        float(
            (
                ft.edit(model, "H2", source, LABELS, strength=s, seed=5, output="latents") - source
            ).norm()
        )
        for s in (0.001, 0.1, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.02 * float(source.norm())


def test_images_in_images_out():
    model = pixel_model()
    before = pictures()
    after = ft.edit(model, "H1", before, LABELS, strength=0.01, seed=0)
    assert (after.shape, after.dtype) == (before.shape, torch.uint8)
    assert (after.int() - before.int()).abs().max() < 16
    assert ft.edit(model, "H1", before.numpy(), LABELS, strength=0.01, seed=0).equal(after)


def test_one_image_serves_all_labels_and_one_label_all_images():
    model = pixel_model()
    assert len(ft.edit(model, "E1", pictures(1), LABELS, seed=0)) == 3
    assert len(ft.edit(model, "E1", pictures(4), 7, seed=0)) == 4
    assert len(ft.edit(model, "E1", pictures(4), [7], seed=0)) == 4
    with pytest.raises(ValueError, match="labels must be one or as many as there are of the other"):
        ft.edit(model, "E1", pictures(3), [1, 2])


def test_guidance_batches_and_captures_are_those_of_sampling():
    model, recorder = captured_model()
    source, noise = torch.randn(5, *model.latent_shape), torch.randn(5, *model.latent_shape)
    options = dict(strength=0.5, guidance=2.0, noise=noise, batch_size=2, output="latents")
    labels = [1, 2, 3, 4, 5]
    results = [ft.edit(model, "H1P1R1", source, labels, **options) for _ in range(2)]
    plain = ft.edit(tiny_model(), "H1P1R1", source, labels, **options)
    assert all(r.equal(plain) for r in results)
    assert recorder.recorded == 1
    ft.sample(model, "H1P1R1", labels, guidance=2.0, batch_size=2)  # another kind of run
    ft.sample(model, "H1P1R1", labels, guidance=2.0, batch_size=2)
    assert recorder.recorded == 2


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("plan", ["H1P2R2", "C3", "E1S1"])
def test_outside_the_mask_latents_are_the_sources_own(plan, strength):
    model = tiny_model()
    source, mask = torch.randn(3, *model.latent_shape), half()
    x = ft.inpaint(
        model, plan, source, mask, LABELS, strength=strength, guidance=2.0, seed=0, output="latents"
    )
    assert x[..., ~mask].equal(source[..., ~mask])
    assert (x - source)[..., mask].abs().mean() > 0.1


def test_between_steps_the_outside_is_on_its_path():
    model = tiny_model()
    source, noise, mask = (
        torch.randn(3, *model.latent_shape),
        torch.randn(3, *model.latent_shape),
        half(),
    )
    seen = []
    ft.inpaint(
        model, "H2P1", source, mask, LABELS, noise=noise, output="latents", callback=seen.append
    )
    for info in seen:
        assert info.x[..., ~mask].equal(on_path(source, noise, info.t)[..., ~mask])
    free = []
    ft.sample(model, "H2P1", LABELS, noise=noise, callback=free.append)
    assert_close(
        seen[0].x[..., mask], free[0].x[..., mask], 1e-6
    )  # the first step knows nothing of the source
    assert (seen[2].x - free[2].x)[..., mask].abs().max() > 1e-4  # later ones see it


def test_pixels_outside_the_mask_are_untouched_even_where_a_latent_is_shared():
    model = tiny_model(GREY)
    model.vae = Blocks()
    before = torch.randint(256, (3, 16, 16, 1), dtype=torch.uint8).expand(-1, -1, -1, 3)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[5:9, 3:10] = True  # cuts through blocks of two
    after = ft.inpaint(model, "H1R1", before, mask, LABELS, seed=0)
    assert after[:, ~mask].equal(before[:, ~mask])
    assert (after[:, mask] != before[:, mask]).float().mean() > 0.5
    latents = ft.inpaint(model, "H1R1", before, mask, LABELS, seed=0, output="latents")
    changed = (latents != model.vae.encode(before)[0]).any(dim=0)[0]
    assert changed[2:5, 1:5].all()  # every latent that the mask touches
    changed[2:5, 1:5] = False
    assert not changed.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.numpy(),
        lambda m: m.float(),
        lambda m: m.to(torch.uint8),
        lambda m: 255 * m.to(torch.uint8),
        lambda m: m.expand(3, -1, -1),
    ],
)
def test_masks_of_every_kind(make):
    model, source = tiny_model(), torch.randn(3, *CONFIG_SHAPE)
    plain = ft.inpaint(model, "H1", source, half(), LABELS, seed=0, output="latents")
    assert ft.inpaint(model, "H1", source, make(half()), LABELS, seed=0, output="latents").equal(
        plain
    )


def test_an_inpainting_stopped_by_its_callback_returns_what_there_is():
    model = pixel_model()
    after = ft.inpaint(
        model,
        "E4",
        pictures(),
        half(),
        LABELS,
        seed=0,
        batch_size=2,
        callback=lambda info: info.step < 2,
    )
    assert after.shape == (2, 8, 8, 3)
