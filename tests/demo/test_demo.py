"""The demo: what its page asks of a model."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import flowturbo as ft
from flowturbo.cli.demo import Demo, plans_for
from flowturbo.demo import html
from flowturbo.demo.session import (
    RUNS,
    Comparison,
    DemoSession,
    Request,
    velocity_curve,
)

ASKED = Request("H1P2R1", "E3", "cycle", 4, seed=7, guidance=1.5)


@pytest.fixture
def session(model) -> Iterator[DemoSession]:
    session = DemoSession(model, {"H1P2R1": None, "E3": None})
    yield session
    session.close()


def last(comparisons: Iterator[Comparison]) -> Comparison:
    return list(comparisons)[-1]


def source(model: ft.FlowModel) -> np.ndarray:
    return ft.sample(model, "H4", [3], seed=1, output="uint8")[0].numpy()


@pytest.mark.parametrize("classes", ["cycle", 3])
def test_both_plans_make_what_the_library_makes_of_the_same_noise(model, session, classes):
    comparison = last(session.sample(ASKED._replace(classes=classes, low=0.1, high=0.9)))
    assert comparison.labels == ([0, 1, 2, 3] if classes == "cycle" else [3] * 4)
    for side, text in ((comparison.a, "H1P2R1"), (comparison.b, "E3")):
        plan = ft.Plan.parse(text, guidance_interval=(0.1, 0.9))
        assert side.plan == plan
        assert side.images.equal(
            ft.sample(model, plan, comparison.labels, guidance=1.5, seed=7, output="uint8")
        )
        assert side.speed.seconds > 0
        assert side.speed.runs >= 1
    assert comparison.rms == pytest.approx(
        float((comparison.a.images.double() - comparison.b.images.double()).square().mean().sqrt())
    )


def test_previews_come_in_the_order_of_steps_and_milliseconds_after_the_images(session):
    seen = list(session.sample(ASKED._replace(plan_a="E64", plan_b="E64")))
    steps = [
        (
            comparison.a.step,
            comparison.b.step,
            sum(side.speed is not None for side in (comparison.a, comparison.b)),
        )
        for comparison in seen
    ]
    assert steps == sorted(steps)
    assert any(
        0 < comparison.a.step < 64 and comparison.a.images is not None for comparison in seen
    )
    assert steps[-1] == (64, 64, 2)
    assert seen[0].rms is None


def test_what_is_timed_has_no_previews(session, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "flowturbo.demo.session.seconds", lambda run, device: timed.append(run) or 0.5
    )
    monkeypatch.setattr(session, "_previews", lambda *_: lambda info: None)
    last(session.sample(ASKED))
    assert len(timed) == 2 * RUNS
    assert [run.keywords["plan"] for run in timed[:2]] == [
        ft.Plan.parse(ASKED.plan_a),
        ft.Plan.parse(ASKED.plan_b),
    ]
    assert not any("callback" in run.keywords for run in timed)


def test_inpainting_is_the_librarys_and_leaves_the_rest_untouched(model, session):
    image, mask = source(model), np.zeros((8, 8), bool)
    mask[2:5, 3:] = True
    comparison = last(session.change(ASKED, image, mask, 0.9))
    for side in (comparison.a, comparison.b):
        expected = ft.inpaint(
            model,
            side.plan,
            image[None],
            mask,
            comparison.labels,
            strength=0.9,
            guidance=1.5,
            seed=7,
        )
        assert side.images.equal(expected)
        assert (side.images.numpy()[:, ~mask] == image[~mask]).all()
        assert (side.images.numpy()[:, mask] != image[mask]).any()


def test_without_a_mask_the_whole_image_is_edited(model, session):
    image = source(model)
    comparison = last(session.change(ASKED, image, None, 0.5))
    assert comparison.a.images.equal(
        ft.edit(
            model,
            comparison.a.plan,
            image[None],
            comparison.labels,
            strength=0.5,
            guidance=1.5,
            seed=7,
        )
    )


def test_the_image_to_inpaint_is_of_other_noise_than_what_is_made_of_it(model, session):
    first, second = (session.picture(ASKED, number) for number in (0, 1))
    drawn = last(session.sample(ASKED)).a.images.numpy()
    assert first.shape == (8, 8, 3)
    assert not (first == second).all()
    assert not any((first == image).all() for image in drawn)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(plan_a="H1p3"), r"^Plan A: plan must look like 'H1P5R3'(.|\n)*\n  H1p3\n    \^"),
        (dict(plan_b="R3"), "^Plan B: .*R needs the velocity of an earlier step"),
        (dict(plan_b=""), "^Plan B: plan must look like"),
        (dict(plan_b=None), "^Plan B: plan must be a string"),
        (dict(plan_a="H65"), "^Plan A: plan must have at most 64 steps in this demo, got 65"),
        (dict(low=0.8, high=0.2), r"guidance_interval must be \(low, high\)"),
        (dict(low=None), "guidance_interval must be a number"),
        (dict(seed=-1), "seed must be from 0"),
        (dict(seed=None), "seed must be a whole number"),
        (dict(images=17), "images must be from 1 to 16 in this demo, got 17"),
        (dict(images=0), "images must be from 1 to 16"),
        (dict(images=2.5), "images must be a whole number"),
        (dict(classes=10), "labels must be from 0 to 9, got 10"),
        (dict(classes="all"), "label_rule must be one of cycle, random, got 'all'"),
        (dict(classes=None), "class must be a whole number, got None"),
        (dict(guidance=float("nan")), "guidance must be finite"),
    ],
)
def test_bad_wishes_are_answered_in_the_librarys_words(session, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        last(session.sample(ASKED._replace(**changes)))
    assert last(session.sample(ASKED)).rms is not None, "and the next wish is served"


def test_a_refiner_step_without_a_refiner_is_refused(model):
    bare = DemoSession(ft.load("digits", device="cpu"), {"E3": None})
    bare.model.refiner = None
    with pytest.raises(
        ValueError, match=r"Plan A: plan H1P2R1 has refiner steps, but the model has no refiner"
    ):
        last(bare.sample(ASKED))
    bare.close()


def test_visitors_name_plans_of_the_operators_files_and_open_none(model, tmp_path, monkeypatch):
    offered, secret = tmp_path / "fast.json", tmp_path / "secret.json"
    plan = ft.Plan.parse("H2P1", grid=(0, 0.2, 0.7, 1))
    for path in (offered, secret):
        plan.save(path)
    plans = plans_for(Demo(plans=(str(offered), "E2")), model)
    assert plans == {"fast.json": plan, "E2": None}
    opened: list[object] = []
    monkeypatch.setattr(ft.Plan, "load", opened.append)
    session = DemoSession(model, plans)
    assert last(session.sample(ASKED._replace(plan_a="fast.json"))).a.plan == plan
    for text in (str(secret), str(offered), "secret.json", "./fast.json"):
        with pytest.raises(ValueError, match="plan must look like"):
            last(session.sample(ASKED._replace(plan_b=text)))
    with pytest.raises(ValueError, match="a plan's file holds its guidance interval"):
        last(session.sample(ASKED._replace(plan_a="fast.json", low=0.3)))
    session.close()
    assert not opened


def test_work_that_nobody_waits_for_ends(session, monkeypatch):
    timed: list[object] = []
    monkeypatch.setattr("flowturbo.demo.session.seconds", lambda *_: timed.append(1) or 0.1)
    watching = session.sample(ASKED._replace(plan_a="H64", plan_b="H64"))
    next(watching)
    watching.close()
    session.picture(ASKED, 0)  # waits for what is before it
    assert not timed


def test_visitors_are_served_one_after_the_other_each_with_the_own_wish(session):
    wishes = [ASKED._replace(seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as visitors:
        at_once = list(visitors.map(lambda wish: last(session.sample(wish)).a.images, wishes))
    for wish, images in zip(wishes, at_once, strict=True):
        assert images.equal(last(session.sample(wish)).a.images)


def test_what_is_painted_is_a_pixel_by_a_quarter_of_it(session):
    paint = np.zeros((384, 384), np.uint8)
    paint[:48, :48] = 255  # all of the first
    paint[48:72, 48:72] = 255  # a quarter of another, and less of a third
    paint[96:119, 96:119] = 255
    mask = session.painted(paint)
    assert mask.shape == (8, 8)
    assert np.argwhere(mask).tolist() == [[0, 0], [1, 1]]
    assert not session.painted(np.zeros((1, 1), np.uint8)).any()


def test_images_that_are_brought_get_the_models_size_within_bounds(session):
    assert session.fitted(Image.new("RGBA", (40, 30), (255, 0, 0, 255))).shape == (8, 8, 3)
    for size in ((9, 1), (5000, 4000)):
        with pytest.raises(
            ValueError, match=f"image must have at most .* got {size[0]} x {size[1]}"
        ):
            session.fitted(Image.new("L", size))


def test_the_curve_is_measured_once_for_each_guidance(session, monkeypatch):
    measured: list[float] = []

    def counted(model, *, guidance, **how):
        measured.append(guidance)
        return velocity_curve(
            model, guidance=guidance, **{**how, "steps": 4, "images": 2, "batch_size": 2}
        )

    monkeypatch.setattr("flowturbo.demo.session.velocity_curve", counted)
    plots = [session.curve(guidance) for guidance in (1.5, 1.5, 2.0)]
    assert measured == [1.5, 2.0]
    assert plots[0] == plots[1] != plots[2]
    assert Image.open(io.BytesIO(plots[0])).format == "PNG"
    with pytest.raises(ValueError, match="guidance must be finite"):
        session.curve(float("inf"))


def test_what_a_visitor_wrote_is_shown_as_text():
    assert (
        html.error_box("plan <b>\n  ^ & it")
        == '<pre class="ft-error">plan &lt;b&gt;\n  ^ &amp; it</pre>'
    )


def test_a_name_in_a_request_makes_the_server_fetch_nothing(session, tmp_path):
    pytest.importorskip("gradio")
    from flowturbo.demo.page import page

    editors = [
        block
        for block in page(session, 1.5).blocks.values()
        if block.get_block_name() == "imageeditor"
    ]
    assert len(editors) == 1
    for name in ("https://127.0.0.1:1/a.png", "HTTP://127.0.0.1:1/a.png"):
        with pytest.raises(ValueError, match="image must be uploaded, got an address"):
            asyncio.run(editors[0].async_move_resource_to_block_cache(name))
