"""Editing and inpainting: where they start, what they keep, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from close import assert_close
from fake_recorder import captured_model
from PIL import Image
from tiny import CONFIG, tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.models.vae import Pixels
from flowturbo.sampling.edit import edit_job
from flowturbo.solver.path import on_path
from flowturbo.storage.files import CheckpointError
from flowturbo.storage.images import box_mask, read_mask, read_npz, read_transparency

GREY = replace(CONFIG, channels=1)
LABELS = [1, 8, 3]


def pixel_model() -> ft.FlowModel:
    model = tiny_model(GREY)
    model.vae = Pixels()
    return model


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    grey = torch.randint(
        256, (count, 8, 8, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return grey.expand(-1, -1, -1, 3)


class Blocks(Pixels):
    """An autoencoder of factor 2: a latent is the mean of its four pixels."""

    factor = 2

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        latents, _ = super().encode(images)
        return torch.nn.functional.avg_pool2d(latents, 2), None

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.repeat_interleave(2, 2).repeat_interleave(2, 3))


# Editing


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


# Inpainting


def half(height: int = 8, width: int = 8) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, width // 2 :] = True
    return mask


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


CONFIG_SHAPE = (4, 8, 8)


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


# Refusals


@pytest.mark.parametrize(
    "arguments, kind, said",
    [
        (dict(strength=0.0), ValueError, "strength must be above 0 and at most 1, got 0"),
        (dict(strength=1.5), ValueError, "strength must be above 0 and at most 1, got 1.5"),
        (dict(strength=math.nan), ValueError, "strength must be finite"),
        (
            dict(images=pictures().float()),
            ValueError,
            r"images given as latents must have shape \(N, 1, 8, 8\)",
        ),
        (dict(images=torch.full((3, 1, 8, 8), math.nan)), ValueError, "images must be finite"),
        (
            dict(images=pictures()[..., :1]),
            ValueError,
            r"images must be uint8 of shape \(N, height, width, 3\)",
        ),
        (
            dict(images=pictures()[0]),
            ValueError,
            r"images must be uint8 of shape \(N, height, width, 3\)",
        ),
        (dict(images=pictures().int()), ValueError, "images must be uint8 .* got torch.int32"),
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
        (half().int(), TypeError, "mask must be bool, uint8 or floating point, got torch.int32"),
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


# Files


def test_the_command_edits_and_inpaints_an_npz(tmp_path, capsys):
    assert main(["sample", "--num", "3", "--plan", "H1P1R1", "--out", str(tmp_path / "d.npz")]) == 0
    common = [str(tmp_path / "d.npz"), "--plan", "H1R1"]
    assert (
        main(
            [
                "edit",
                *common,
                "--labels",
                "8",
                "--strength",
                "0.3",
                "--out",
                str(tmp_path / "e.npz"),
            ]
        )
        == 0
    )
    with np.load(tmp_path / "e.npz") as found:
        assert found["arr_0"].shape == (3, 8, 8, 3)
        assert found["labels"].tolist() == [8, 8, 8]
    arguments = [
        "--labels",
        "1",
        "2",
        "3",
        "--box",
        "0.5",
        "0",
        "1",
        "1",
        "--out",
        str(tmp_path / "i.png"),
    ]
    assert main(["inpaint", *common, *arguments]) == 0
    assert Image.open(tmp_path / "i.png").width > 3 * 96
    before = read_npz(tmp_path / "d.npz")
    assert main(["inpaint", *common, *arguments[:-1], str(tmp_path / "i.npz")]) == 0
    after = read_npz(tmp_path / "i.npz")
    assert np.array_equal(after[:, :, :4], before[:, :, :4])
    assert not np.array_equal(after[:, :, 4:], before[:, :, 4:])
    assert main(["edit", str(tmp_path / "d.npz")]) == 2
    assert "images and labels (or prompts) must name at least one each" in capsys.readouterr().err


def test_the_command_takes_image_files_of_any_size_and_masks_of_theirs(tmp_path, capsys):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    )
    picture.save(tmp_path / "a.png")
    mask = Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 20, 30))
    mask.save(tmp_path / "m.png")
    out = tmp_path / "o.npz"
    assert (
        main(
            [
                "inpaint",
                str(tmp_path / "a.png"),
                "--labels",
                "3",
                "--mask",
                str(tmp_path / "m.png"),
                "--plan",
                "H1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert read_npz(out).shape == (1, 8, 8, 3)
    Image.new("L", (41, 30), 255).save(tmp_path / "wrong.png")
    assert (
        main(
            [
                "inpaint",
                str(tmp_path / "a.png"),
                "--labels",
                "3",
                "--mask",
                str(tmp_path / "wrong.png"),
            ]
        )
        == 2
    )
    assert "must have the size of" in capsys.readouterr().err
    assert main(["inpaint", str(tmp_path / "a.png"), "--labels", "3"]) == 2
    assert "mask or box must say what to make anew" in capsys.readouterr().err
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (20, 0, 40, 30))
    clear.save(tmp_path / "clear.png")
    assert (
        main(
            [
                "inpaint",
                str(tmp_path / "clear.png"),
                "--labels",
                "3",
                "--plan",
                "H1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert not (tmp_path / "inpainted.png").exists()


def test_masks_are_cropped_as_their_images_are(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    mask = Image.new("L", (40, 20))
    mask.paste(255, (20, 0, 40, 20))
    mask.save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png", 10, tmp_path / "a.png")
    assert not found[:, :4].any()
    assert found[:, 6:].all()
    clear = Image.new("RGBA", (40, 20), (9, 9, 9, 255))
    clear.paste((9, 9, 9, 0), (20, 0, 40, 20))
    clear.save(tmp_path / "c.png")
    assert np.array_equal(read_transparency(tmp_path / "c.png", 10), found)
    assert np.array_equal(read_mask(tmp_path / "c.png", 10, tmp_path / "a.png"), found)
    assert read_transparency(tmp_path / "a.png", 10) is None


def test_boxes_are_shares_of_the_image():
    assert box_mask((0.5, 0, 1, 1), 4, 4).tolist() == [[False, False, True, True]] * 4
    assert box_mask((0, 0.25, 0.3, 0.5), 4, 4).sum() == 1
    for box in ((0.5, 0, 0.5, 1), (0, 0, 2, 1), (0, 0.8, 1, 0.2)):
        with pytest.raises(ValueError, match="box must be left, top, right, bottom"):
            box_mask(box, 4, 4)


def test_files_that_hold_no_images_are_named(tmp_path):
    np.savez(tmp_path / "bad.npz", arr_0=np.zeros((2, 3)))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name in ("bad.npz", "torn.npz", "none.npz"):
        with pytest.raises(CheckpointError, match=name):
            read_npz(tmp_path / name)
