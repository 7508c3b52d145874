"""What an edit refuses."""

from __future__ import annotations

import math

import pytest
import torch
from edits import CONFIG_SHAPE, GREY, LABELS, half, pictures, pixel_model
from tiny import tiny_model

import flowturbo as ft
from flowturbo.sampling.edit import edit_job


@pytest.mark.parametrize(
    "arguments, kind, said",
    [
        (dict(strength=0.0), ValueError, "strength must be above 0 and at most 1, got 0"),
        (dict(strength=1.5), ValueError, "strength must be above 0 and at most 1, got 1.5"),
        (dict(strength=math.nan), ValueError, "strength must be finite"),
        (
            dict(images=torch.randn(3, 2, 8, 8)),
            ValueError,
            r"or as latents \(N, 1, 8, 8\) in floating point, got float32 of \(3, 2, 8, 8\)",
        ),
        (dict(images=torch.full((3, 1, 8, 8), math.nan)), ValueError, "images must be finite"),
        (
            dict(images=pictures()[..., :1]),
            ValueError,
            r"images must have shape \(N, height, width, 3\), or as latents",
        ),
        (
            dict(images=pictures()[0]),
            ValueError,
            r"images must have shape \(N, height, width, 3\), or as latents",
        ),
        (dict(images=pictures().int()), TypeError, "images must be uint8, .* got int32, of which"),
        (
            dict(images=pictures()[:, :4]),
            ValueError,
            "images must be 8 x 8 for this model, got 4 x 8",
        ),
        (dict(images="a.png"), TypeError, "images must be an array or a tensor, got str"),
        (dict(labels=None), ValueError, "labels must say what to make"),
        (dict(labels=[1, 2, 11]), ValueError, "labels must be from 0 to 9, got 11"),
        (dict(plan="R1"), ValueError, "R needs the velocity"),
        (dict(guidance=math.inf), ValueError, "guidance must be finite"),
        (dict(model=7), TypeError, "model must be a FlowModel"),
    ],
)
def test_what_an_edit_refuses(arguments, kind, said):
    with pytest.raises(kind, match=said):
        ft.edit(
            **{
                "model": pixel_model(),
                "plan": "H1R1",
                "images": pictures(),
                "labels": LABELS,
                **arguments,
            }
        )


@pytest.mark.parametrize(
    "mask, kind, said",
    [
        (
            half(8, 4),
            ValueError,
            r"mask must have the images' size, shape \(8, 8\) or \(3, 8, 8\), got \(8, 4\)",
        ),
        (half().expand(2, 8, 8), ValueError, r"got \(2, 8, 8\)"),
        (
            torch.zeros(8, 8, dtype=torch.bool),
            ValueError,
            "mask must choose at least one pixel of every image",
        ),
        (
            torch.stack([half(), half(), half() & False]),
            ValueError,
            "mask must choose at least one pixel of every image",
        ),
        (3 * half().int(), TypeError, "mask must be uint8, uint16, bool or .* got int32, of which"),
        ("mask.png", TypeError, "mask must be an array or a tensor"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, kind, said):
    with pytest.raises(kind, match=said):
        ft.inpaint(pixel_model(), "H1R1", pictures(), mask, LABELS)


def test_images_need_a_vae_and_latents_do_not():
    model = tiny_model(GREY)
    with pytest.raises(ValueError, match="images need a model that was loaded with a vae"):
        ft.edit(model, "H1", pictures(), LABELS, output="latents")
    assert ft.edit(model, "H1", torch.randn(3, 1, 8, 8), LABELS, output="latents").shape == (
        3,
        1,
        8,
        8,
    )
    with pytest.raises(ValueError, match="output='uint8' needs a model"):
        ft.edit(model, "H1", torch.randn(3, 1, 8, 8), LABELS)


def test_a_plan_that_starts_later_is_for_edit():
    plan = ft.Plan.parse("H1P1").starting_at(0.25)
    assert plan.grid == (0.25, 0.625, 1.0)
    assert plan.starting_at(0.0) == ft.Plan.parse("H1P1")
    with pytest.raises(ValueError, match=r"plan must start at 0, got one that starts at 0.25"):
        ft.sample(tiny_model(), plan, LABELS)
    for t in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="t must be"):
            ft.Plan.parse("H1").starting_at(t)
    _, job = edit_job(
        tiny_model(), plan, torch.randn(1, *CONFIG_SHAPE), 3, 1.0, None, None, 0, "latents"
    )
    assert "from t = 0.25" in str(job)
