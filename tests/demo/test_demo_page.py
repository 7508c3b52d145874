"""The demo's page in a real browser.

FLOWTURBO_SCREENSHOT=docs/demo.png writes the picture of the documents.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flowturbo as ft
from flowturbo.demo.session import (
    PICTURES,
)
from flowturbo.runtime import rng
from flowturbo.storage.images import fitted

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
    command = [sys.executable, "-m", "flowturbo", "demo", "--model", "digits"]
    command += ["--port", "0", "--device", "cpu"]
    environment = {
        **os.environ,
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
            address = next(
                filter(
                    None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
                ),
                None,
            )
            assert address, (folder / "said").read_text()
            yield address[0]
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
        requests: list[str] = []
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(address)
        yield opened
        browser.close()
        elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        assert requests
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
    card = handle.json_value()  # read in one go: the next change may be on its way
    assert re.fullmatch(r"[0-9.]+ ms an image", card["speed"])
    assert all(url.startswith("data:image/png;base64,") for url in card["urls"])
    return np.stack(
        [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
            for url in card["urls"]
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


def sampled(model: ft.FlowModel, plan: str, labels: list[int], **changes: object) -> np.ndarray:
    options = {"guidance": 1.5, "seed": 0, "output": "uint8", **changes}
    return ft.sample(model, plan, labels, **options).numpy()


def choose_another_class_plan_and_seed(page, model: ft.FlowModel) -> None:
    choose(page, "class", "3")
    choose(page, "plan-b", "E4")
    page.locator("#next").click()
    page.wait_for_function("document.querySelector('#seed input').value === '1'")
    page.wait_for_function(
        "document.querySelector('#sampled-summary').textContent.includes('levels')"
    )
    expected = {plan: sampled(model, plan, [3] * 10, seed=1) for plan in ("H1P5R3", "E4")}
    for _ in range(100):  # three changes, each shown when it is done
        images = shown(page, "sampled-b", "E4", [3] * 10)
        if (images == expected["E4"]).all():
            break
        time.sleep(0.2)
    assert (images == expected["E4"]).all()
    assert (shown(page, "sampled-a", "H1P5R3", [3] * 10) == expected["H1P5R3"]).all()


def choose_no_plan_and_a_file_of_the_server(page, secret: Path) -> None:
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
        urllib.request.urlopen(f"{page.url}gradio_api/file={secret}")


def inpaint_an_image_and_a_photo(page, model: ft.FlowModel, photo: Path) -> None:
    page.get_by_role("tab", name="Inpaint").click()
    image = sampled(model, "H1P5R3", [3], noise=rng.noise(model.latent_shape, 1, [PICTURES]))[0]
    page.locator("#editor canvas").first.wait_for()
    page.locator("#change").click()
    page.wait_for_function(
        "document.querySelector('#error')?.textContent.includes('mask must choose at least one "
        "pixel')"
    )
    assert any(kept_outside(page, image, 3) for _ in range(TRIES))

    # The model's size is cut out of a photo.
    Image.effect_noise((90, 60), 100).convert("RGB").save(photo)
    page.locator("#editor input[type=file]").first.set_input_files(photo)
    with Image.open(photo) as opened:
        image = fitted(opened, 8)
    page.wait_for_timeout(3000)  # mostly enough, and quicker than another try
    assert any(kept_outside(page, image, 3) for _ in range(TRIES))


@pytest.mark.slow
def test_a_visitors_way_through_the_page(model, page, tmp_path):
    labels = list(range(10))
    assert (shown(page, "sampled-a", "H1P5R3", labels) == sampled(model, "H1P5R3", labels)).all()
    assert (shown(page, "sampled-b", "H8", labels) == sampled(model, "H8", labels)).all()
    if picture := os.environ.get("FLOWTURBO_SCREENSHOT"):
        page.mouse.move(0, 0)
        time.sleep(1)  # until nothing fades any more
        page.screenshot(path=picture)

    choose_another_class_plan_and_seed(page, model)
    choose_no_plan_and_a_file_of_the_server(page, tmp_path / "said")
    inpaint_an_image_and_a_photo(page, model, tmp_path / "photo.png")

    page.get_by_role("tab", name="Velocity").click()
    page.wait_for_function("document.querySelector('#curve img')?.naturalWidth > 500")
    assert "guidance 1.5" in page.locator("#curve").inner_text()
