"""The demo: what its page asks of a model, and the page itself in a real browser.

FLOWTURBO_SCREENSHOT=docs/demo.png writes the picture of the documents.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

import flowturbo as ft
from flowturbo.cli import demo
from flowturbo.cli.demo import Demo, plans_for
from flowturbo.cli.main import main
from flowturbo.demo import html as demo_html
from flowturbo.demo import session as demo_studio
from flowturbo.demo.session import PICTURES, Comparison, DemoSession, Request
from flowturbo.runtime import rng
from flowturbo.storage.images import fitted

ASKED = Request("H1P2R1", "E3", "cycle", 4, seed=7, guidance=1.5)


@pytest.fixture(scope="module")
def model() -> ft.FlowModel:
    return ft.load("digits", device="cpu")


@pytest.fixture
def session(model) -> Iterator[DemoSession]:
    made = DemoSession(model, {"H1P2R1": None, "E3": None})
    yield made
    made.close()


def last(found: Iterator[Comparison]) -> Comparison:
    return list(found)[-1]


def source(model: ft.FlowModel) -> np.ndarray:
    return ft.sample(model, "H4", [3], seed=1, output="uint8")[0].numpy()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("classes", ["cycle", 3])
def test_both_plans_make_what_the_library_makes_of_the_same_noise(model, session, classes):
    found = last(session.sample(ASKED._replace(classes=classes, low=0.1, high=0.9)))
    assert found.labels == ([0, 1, 2, 3] if classes == "cycle" else [3] * 4)
    for side, text in ((found.a, "H1P2R1"), (found.b, "E3")):
        plan = ft.Plan.parse(text, guidance_interval=(0.1, 0.9))
        assert side.plan == plan
        assert side.images.equal(
            ft.sample(model, plan, found.labels, guidance=1.5, seed=7, output="uint8")
        )
        assert side.speed.seconds > 0
        assert side.speed.runs >= 1
    assert found.rms == pytest.approx(
        float((found.a.images.double() - found.b.images.double()).square().mean().sqrt())
    )


def test_previews_come_in_the_order_of_steps_and_milliseconds_after_the_images(session):
    seen = list(session.sample(ASKED._replace(plan_a="E64", plan_b="E64")))
    steps = [
        (found.a.step, found.b.step, sum(side.speed is not None for side in (found.a, found.b)))
        for found in seen
    ]
    assert steps == sorted(steps)
    assert any(0 < found.a.step < 64 and found.a.images is not None for found in seen)
    assert steps[-1] == (64, 64, 2)
    assert seen[0].rms is None


def test_what_is_timed_has_no_previews(session, monkeypatch):
    timed = []
    monkeypatch.setattr(demo_studio, "seconds", lambda run, device: timed.append(run) or 0.5)
    monkeypatch.setattr(session, "_previews", lambda *_: lambda info: None)
    last(session.sample(ASKED))
    assert len(timed) == 2 * demo_studio.RUNS
    assert [run.keywords["plan"] for run in timed[:2]] == [
        ft.Plan.parse(ASKED.plan_a),
        ft.Plan.parse(ASKED.plan_b),
    ]
    assert not any("callback" in run.keywords for run in timed)


@pytest.mark.usefixtures("one_thread")
def test_inpainting_is_the_librarys_and_leaves_the_rest_untouched(model, session):
    image, mask = source(model), np.zeros((8, 8), bool)
    mask[2:5, 3:] = True
    found = last(session.change(ASKED, image, mask, 0.9))
    for side in (found.a, found.b):
        expected = ft.inpaint(
            model, side.plan, image[None], mask, found.labels, strength=0.9, guidance=1.5, seed=7
        )
        assert side.images.equal(expected)
        assert (side.images.numpy()[:, ~mask] == image[~mask]).all()
        assert (side.images.numpy()[:, mask] != image[mask]).any()


@pytest.mark.usefixtures("one_thread")
def test_without_a_mask_the_whole_image_is_edited(model, session):
    image = source(model)
    found = last(session.change(ASKED, image, None, 0.5))
    assert found.a.images.equal(
        ft.edit(model, found.a.plan, image[None], found.labels, strength=0.5, guidance=1.5, seed=7)
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
    monkeypatch.setattr(demo_studio, "seconds", lambda *_: timed.append(1) or 0.1)
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
    chosen = session.painted(paint)
    assert chosen.shape == (8, 8)
    assert np.argwhere(chosen).tolist() == [[0, 0], [1, 1]]
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
    velocity_curve = demo_studio.velocity_curve

    def counted(model, *, guidance, **how):
        measured.append(guidance)
        return velocity_curve(
            model, guidance=guidance, **{**how, "steps": 4, "images": 2, "batch_size": 2}
        )

    monkeypatch.setattr(demo_studio, "velocity_curve", counted)
    plots = [session.curve(guidance) for guidance in (1.5, 1.5, 2.0)]
    assert measured == [1.5, 2.0]
    assert plots[0] == plots[1] != plots[2]
    assert Image.open(io.BytesIO(plots[0])).format == "PNG"
    with pytest.raises(ValueError, match="guidance must be finite"):
        session.curve(float("inf"))


def test_what_a_visitor_wrote_is_shown_as_text():
    assert (
        demo_html.error_box("plan <b>\n  ^ & it")
        == '<pre class="ft-error">plan &lt;b&gt;\n  ^ &amp; it</pre>'
    )


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


CHROMIUM = os.environ.get("FLOWTURBO_CHROMIUM") or shutil.which("chromium")
CHROMIUM_FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --disable-quic"""
PATIENCE = 120_000
"""Milliseconds: for machines that do much else. Nothing waits so long but what fails."""
TRIES = 5
"""To paint: the page does not say when the editor has taken up an image, nor when it has sent what
was painted.
"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A demo in a process of its own: its address. It must end by Ctrl-C, at once and without
    complaint.
    """
    command = [sys.executable, "-m", "flowturbo", "demo", "--port", "0", "--device", "cpu"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(ft.__file__).parent.parent),
    }
    with (
        open(folder / "said", "w") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=folder, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            found = next(
                filter(
                    None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
                ),
                None,
            )
            assert found, (folder / "said").read_text()
            yield found[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
            assert (folder / "said").read_text() == ""
        finally:
            process.kill()


@pytest.fixture
def page(tmp_path):
    """The demo's page in chromium, which must fetch nothing from elsewhere."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed", exc_type=ImportError
    )
    pytest.importorskip("gradio", reason="gradio is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with served(tmp_path) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=CHROMIUM_FLAGS.split()
        )
        opened = browser.new_page(viewport={"width": 1280, "height": 720})
        opened.set_default_timeout(PATIENCE)
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(address)
        yield opened
        browser.close()
        elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert asked
        assert not elsewhere


def shown(page, side: str, plan: str, labels: list[int]) -> np.ndarray:
    """The images of a side, decoded, once they are those of this plan and these classes and
    milliseconds stand there.
    """
    handle = page.wait_for_function(
        """([side, plan, captions]) => {
            const card = document.querySelector(`#${side} .ft-side[data-done=true]`);
            const text = selector =>
                [...card.querySelectorAll(selector)].map(found => found.textContent).join('');
            return card && text('.ft-plan').includes(plan) && text('figcaption') === captions
                && {speed: text('.ft-speed'),
                urls: [...card.querySelectorAll('img')].map(image => image.src)};
        }""",
        arg=[side, plan, "".join(f"class {label}" for label in labels)],
    )
    found = handle.json_value()  # read in one go: the next change may be on its way
    assert re.fullmatch(r"[0-9.]+ ms an image", found["speed"])
    assert all(url.startswith("data:image/png;base64,") for url in found["urls"])
    return np.stack(
        [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
            for url in found["urls"]
        ]
    )


def choose(page, control: str, text: str) -> None:
    """Type into a dropdown of the page, as a person does."""
    field = page.locator(f"#{control} input")
    field.click()
    field.fill(text)
    field.press("Enter")


def kept_outside(page, image: np.ndarray, label: int) -> bool:
    """Paint over the middle and have it made anew: whether it is, by both plans, and all far from
    it is the image's own.
    """
    page_errors = pytest.importorskip("playwright.sync_api")
    canvas = page.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=20)
    page.mouse.up()
    page.wait_for_timeout(1000)  # the editor sends what was painted a moment later
    page.evaluate(
        "document.querySelectorAll('#inpaint .ft-side').forEach(card => card.dataset.done = "
        "'before')"
    )
    page.locator("#change").click()
    try:
        page.wait_for_function(
            "document.querySelectorAll('#inpaint [data-done=true]').length == 2",
            timeout=PATIENCE / TRIES,
        )
    except page_errors.TimeoutError:  # nothing was painted yet, says the page
        return False
    far = []
    for side, plan in (("changed-a", "H1P5R3"), ("changed-b", "E2")):
        differs = (shown(page, side, plan, [label] * 10) != image).any(axis=(0, 3))
        far.append(differs[3:5, 3:5].any() and not differs[[0, 1, 6, 7]].any())
    return all(far)


@pytest.mark.usefixtures("one_thread")
def test_a_visitors_way_through_the_page(model, page, tmp_path):
    def made(plan: str, labels: list[int], **how: object) -> np.ndarray:
        return ft.sample(
            model, plan, labels, **{"guidance": 1.5, "seed": 0, "output": "uint8", **how}
        ).numpy()

    every = list(range(10))
    assert (shown(page, "sampled-a", "H1P5R3", every) == made("H1P5R3", every)).all()
    assert (shown(page, "sampled-b", "H8", every) == made("H8", every)).all()
    if picture := os.environ.get("FLOWTURBO_SCREENSHOT"):
        page.mouse.move(0, 0)
        time.sleep(1)  # until nothing fades any more
        page.screenshot(path=picture)

    # Another class, another plan, another seed.
    choose(page, "class", "3")
    choose(page, "plan-b", "E4")
    page.locator("#next").click()
    page.wait_for_function("document.querySelector('#seed input').value === '1'")
    page.wait_for_function(
        "document.querySelector('#sampled-summary').textContent.includes('levels')"
    )
    expected = {plan: made(plan, [3] * 10, seed=1) for plan in ("H1P5R3", "E4")}
    for _ in range(100):  # three changes, each shown when it is done
        found = shown(page, "sampled-b", "E4", [3] * 10)
        if (found == expected["E4"]).all():
            break
        time.sleep(0.2)
    assert (found == expected["E4"]).all()
    assert (shown(page, "sampled-a", "H1P5R3", [3] * 10) == expected["H1P5R3"]).all()

    # A plan that is none, and a file of the server's.
    for text in ("H1p3", "/etc/plan.json"):
        choose(page, "plan-b", text)
        page.wait_for_function(
            "text => document.querySelector('#error')?.textContent.includes(text)", arg=text
        )
        assert "Plan B: plan must look like 'H1P5R3'" in page.locator("#error").inner_text()
    choose(page, "plan-b", "E2")
    shown(page, "sampled-b", "E2", [3] * 10)
    assert page.locator("#error").count() == 0 or not page.locator("#error").inner_text()

    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page.url}gradio_api/file={tmp_path / 'said'}")

    # Paint over the middle of an image, and have it made anew.
    page.get_by_role("tab", name="Inpaint").click()
    image = made("H1P5R3", [3], noise=rng.noise(model.latent_shape, 1, [PICTURES]))[0]
    page.locator("#editor canvas").first.wait_for()
    page.locator("#change").click()
    page.wait_for_function(
        "document.querySelector('#error')?.textContent.includes('mask must choose at least one "
        "pixel')"
    )
    assert any(kept_outside(page, image, 3) for _ in range(TRIES))

    # The same of a photo, of which the model's size is cut.
    photo = tmp_path / "photo.png"
    Image.effect_noise((90, 60), 100).convert("RGB").save(photo)
    page.locator("#editor input[type=file]").first.set_input_files(photo)
    with Image.open(photo) as opened:
        image = fitted(opened, 8)
    page.wait_for_timeout(3000)  # mostly enough, and quicker than another try
    assert any(kept_outside(page, image, 3) for _ in range(TRIES))

    # The velocity.
    page.get_by_role("tab", name="Velocity").click()
    page.wait_for_function("document.querySelector('#curve img')?.naturalWidth > 500")
    assert "guidance 1.5" in page.locator("#curve").inner_text()
