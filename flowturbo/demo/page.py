"""The demo's page: gradio's components, and which of them ask the studio for what."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image
from starlette.requests import ClientDisconnect

from . import html as show
from .session import Comparison, DemoSession, Request

EDITOR = 384
"""Pixels at least, to draw on."""
PAINT = "#ff5a1f"
WAITING = 32
"""Requests that may wait for the model, of all visitors; more are told to come again."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "connect-src 'self' data: blob:",
    )
)
"""What a browser may load: nothing from elsewhere, whatever gradio's page asks for."""
REFUSALS = (ValueError, TypeError, RuntimeError, FloatingPointError)
"""Errors whose text is for whoever asked; others may hold what is none of a visitor's business."""


def application(session: DemoSession, guidance: float) -> FastAPI:
    """The page as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(NothingFromElsewhere)
    gr.mount_gradio_app(
        app,
        page(session, guidance),
        path="/",
        footer_links=[],
        show_error=False,
        max_file_size="20mb",
        ssr_mode=False,
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=show.CSS,
    )
    return app


Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class NothingFromElsewhere:
    """ASGI middleware that tells browsers POLICY."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                ]
            await send(message)

        with suppress(ClientDisconnect):  # who leaves while sending makes no error
            await self.app(scope, receive, with_policy)


def page(session: DemoSession, guidance: float) -> gr.Blocks:
    """Controls on the left, for all tabs: what changes there is shown at once, but for inpainting,
    which waits for its button.
    """
    factor = math.ceil(EDITOR / session.height)
    with gr.Blocks(
        title="flowturbo", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as blocks:
        gr.HTML(show.title(session.about()))
        tab, source, number = gr.State("sample"), gr.State(None), gr.State(0)
        with gr.Row():
            with gr.Column(scale=1, min_width=250):
                controls, after = _controls(session, guidance)
            with gr.Column(scale=4, min_width=640):
                error = gr.HTML(visible=False, elem_id="error")
                with gr.Tab("Sample") as sample_tab:
                    with gr.Row():
                        sampled = _sides("sampled")
                    sampled.append(gr.HTML(elem_id="sampled-summary"))
                with gr.Tab("Inpaint", elem_id="inpaint") as inpaint_tab, gr.Row():
                    with gr.Column(scale=2, min_width=330):
                        editor = _editor(session, factor)
                        with gr.Row():
                            another = gr.Button("New image", min_width=100, elem_id="another")
                            change = gr.Button(
                                "Inpaint", variant="primary", min_width=100, elem_id="change"
                            )
                        part = gr.Radio(
                            [("painted part", "mask"), ("whole image", "all")],
                            value="mask",
                            label="Make anew",
                            elem_id="part",
                        )
                        strength = gr.Slider(
                            0.05,
                            1,
                            1,
                            step=0.05,
                            label="Strength (1 forgets all)",
                            elem_id="strength",
                        )
                    with gr.Column(scale=3, min_width=420):
                        changed = [*_sides("changed"), gr.HTML(elem_id="changed-summary")]
                with gr.Tab("Velocity") as velocity_tab:
                    curve = gr.HTML(elem_id="curve")

        def sample(at: str, *asked: Any) -> Iterator[Any]:
            if at == "sample":
                yield from _shown(lambda: session.sample(Request(*asked)))
            else:
                yield gr.skip()

        def alter(
            painted: dict[str, Any] | None,
            image: np.ndarray | None,
            part: str,
            strength: float,
            *asked: Any,
        ) -> Iterator[Any]:
            def run() -> Iterator[Comparison]:
                if image is None:
                    raise ValueError("image must be made or uploaded first")
                mask = session.painted(_opacity(painted)) if part == "mask" else None
                return session.change(Request(*asked), image, mask, strength)

            yield from _shown(run)

        def pose(image: np.ndarray) -> tuple[Any, ...]:
            """An image to paint on, each of its pixels a square where it is small."""
            return (
                image,
                {"background": _enlarged(image, factor), "layers": [], "composite": None},
                _no_error(),
            )

        def draw(number: int, *asked: Any) -> tuple[Any, ...]:
            return number + 1, *_or_error(lambda: pose(session.picture(Request(*asked), number)), 3)

        def first(image: np.ndarray | None, number: int, *asked: Any) -> tuple[Any, ...]:
            return draw(number, *asked) if image is None else (gr.skip(),) * 4

        def bring(painted: dict[str, Any], image: np.ndarray | None) -> tuple[Any, ...]:
            background = painted["background"]
            # The editor also says "upload" of what it was given from here.
            if background is None or (
                image is not None and np.array_equal(background[..., :3], _enlarged(image, factor))
            ):
                return (gr.skip(),) * 3
            return _or_error(lambda: pose(session.fitted(Image.fromarray(background))), 3)

        def inspect(at: str, guidance: float) -> tuple[Any, ...]:
            if at != "velocity":
                return gr.skip(), gr.skip()
            return _or_error(
                lambda: (show.curve(session.curve(guidance), guidance), _no_error()), 2
            )

        # One request at a time: two would share the machine, and their milliseconds would be of
        # both.
        asks: dict[str, Any] = dict(
            concurrency_limit=1,
            concurrency_id="model",
            api_visibility="private",
            show_progress="hidden",
        )
        told: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
        live = (sample, [tab, *controls], [*sampled, error])
        posed = [source, editor, error]
        seed, guidance_scale = (
            controls[Request._fields.index(name)] for name in ("seed", "guidance")
        )
        # Not `change`, which also tells of what the page begins with.
        gr.on(
            [blocks.load, *(control.input for control in controls)],
            *live,
            trigger_mode="always_last",
            **asks,
        )
        after.click(lambda seed: (seed or 0) + 1, seed, seed, **told).then(
            *live, trigger_mode="always_last", **asks
        )
        sample_tab.select(lambda: "sample", None, tab, **told).then(*live, **asks)
        inpaint_tab.select(lambda: "inpaint", None, tab, **told).then(
            first, [source, number, *controls], [number, *posed], **asks
        )
        another.click(draw, [number, *controls], [number, *posed], trigger_mode="once", **asks)
        editor.upload(bring, [editor, source], posed, **asks)
        editor.clear(lambda: None, None, source, **told)
        change.click(
            alter,
            [editor, source, part, strength, *controls],
            [*changed, error],
            trigger_mode="once",
            **asks,
        )
        velocity_tab.select(lambda: "velocity", None, tab, **told).then(
            inspect, [tab, guidance_scale], [curve, error], **asks
        )
        guidance_scale.input(
            inspect, [tab, guidance_scale], [curve, error], trigger_mode="always_last", **asks
        )
    return blocks.queue(max_size=WAITING, api_open=False)


def _controls(session: DemoSession, guidance: float) -> tuple[list[Any], gr.Button]:
    """One a field of Asked, in its order; and the button for the next seed."""
    names = list(session.plans)
    numbers = [(str(i), i) for i in range(session.model.num_classes)]
    plans = [
        gr.Dropdown(
            names,
            value=value,
            label=f"Plan {name}",
            allow_custom_value=True,
            elem_id=f"plan-{name.lower()}",
        )
        for name, value in (("A", names[0]), ("B", names[min(1, len(names) - 1)]))
    ]
    classes = gr.Dropdown(
        [("each in turn", "cycle"), ("at random", "random"), *numbers],
        value="cycle",
        label="Class",
        elem_id="class",
    )
    count = gr.Slider(
        1, session.max_images, min(10, session.max_images), step=1, label="Images", elem_id="images"
    )
    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    after = gr.Button("Next seed", size="sm", elem_id="next")
    scale = gr.Slider(
        1,
        max(6.0, guidance),
        guidance,
        step=0.1,
        label="Guidance",
        interactive=session.model.null_class is not None,
        elem_id="guidance",
    )
    with gr.Accordion("When guidance is on", open=False):
        low = gr.Slider(0, 1, 0, step=0.05, label="from t (0 is noise)")
        high = gr.Slider(0, 1, 1, step=0.05, label="to t (1 is the image)")
    return [*plans, classes, count, seed, scale, low, high], after


def _sides(name: str) -> list[gr.HTML]:
    """Where two plans are shown."""
    return [
        gr.HTML(show.side(side.upper(), None, []), elem_id=f"{name}-{side}", min_width=300)
        for side in "ab"
    ]


def _editor(session: DemoSession, factor: int) -> gr.ImageEditor:
    editor = gr.ImageEditor(
        show_label=False,
        type="numpy",
        image_mode="RGBA",
        format="png",
        sources=("upload",),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=[PAINT], default_color=PAINT, color_mode="fixed"),
        buttons=[],
        canvas_size=(session.width * factor, session.height * factor),
        elem_id="editor",
    )
    keep = editor.async_move_resource_to_block_cache

    async def keep_what_is_here(name: Any) -> str | None:
        """gradio would fetch what a request names by an address."""
        if "://" in str(name):
            raise ValueError("image must be uploaded, got an address")
        return await keep(name)

    editor.async_move_resource_to_block_cache = keep_what_is_here  # type: ignore[method-assign, assignment]
    return editor


def _enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel as a square of so many."""
    return np.kron(image, np.ones((factor, factor, 1), np.uint8))


def _opacity(painted: dict[str, Any] | None) -> np.ndarray:
    """(height, width) uint8: of all that was drawn."""
    layers = [layer[..., 3] for layer in (painted or {}).get("layers") or []]
    return np.max(layers, axis=0) if layers else np.zeros((1, 1), np.uint8)


def _shown(run: Callable[[], Iterator[Comparison]]) -> Iterator[tuple[Any, ...]]:
    """What becomes of both sides, the summary and the error; an error leaves what was there."""
    try:
        for found in run():
            sides = (
                show.side(name, side, found.labels)
                for name, side in (("A", found.a), ("B", found.b))
            )
            yield *sides, show.summary(found), _no_error()
    except REFUSALS as error:
        yield gr.skip(), gr.skip(), gr.skip(), _error(error)


def _or_error(run: Callable[[], tuple[Any, ...]], count: int) -> tuple[Any, ...]:
    """`count` outputs, of which the last is the error."""
    try:
        return run()
    except REFUSALS as error:
        return *(gr.skip() for _ in range(count - 1)), _error(error)


def _error(error: Exception) -> Any:
    return gr.HTML(show.error_box(str(error)), visible=True)


def _no_error() -> Any:
    return gr.HTML("", visible=False)
