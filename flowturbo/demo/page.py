"""The demo's page: its layout in gradio's components, served as an ASGI application."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from . import html as show
from .events import Components, Handlers, connect
from .session import DemoSession

EDITOR_PIXELS = 384
"""Least height of the editor on the screen; small images are enlarged."""
PAINT = "#ff5a1f"
MAX_WAITING = 32
"""Requests of all visitors that may wait for the model; further ones are refused."""
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
"""The content security policy: browsers load nothing from other servers, whatever gradio asks."""


def application(session: DemoSession, guidance: float) -> FastAPI:
    """The page as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(ContentSecurityPolicy)
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


class ContentSecurityPolicy:
    """ASGI middleware that sends POLICY with every response."""

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

        with suppress(ClientDisconnect):  # a visitor who leaves during an upload is no error
            await self.app(scope, receive, with_policy)


def page(session: DemoSession, guidance: float) -> gr.Blocks:
    """The page's components and events. guidance: its value at the start.

    Changing a control on the left updates the open tab at once, except for inpainting, which waits
    for its button.
    """
    with gr.Blocks(
        title="flowturbo", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as blocks:
        scale = math.ceil(EDITOR_PIXELS / session.height)
        connect(blocks, _layout(session, guidance, scale), Handlers(session, scale))
    return blocks.queue(max_size=MAX_WAITING, api_open=False)


def _layout(session: DemoSession, guidance: float, scale: int) -> Components:
    """Controls on the left, tabs on the right. scale: screen pixels per pixel in the editor."""
    gr.HTML(show.title(session.about()))
    tab, source, number = gr.State("sample"), gr.State(None), gr.State(0)
    with gr.Row():
        with gr.Column(scale=1, min_width=250):
            controls, next_seed = _controls(session, guidance)
        with gr.Column(scale=4, min_width=640):
            error = gr.HTML(visible=False, elem_id="error")
            with gr.Tab("Sample") as sample_tab:
                with gr.Row():
                    sampled = _sides("sampled")
                sampled.append(gr.HTML(elem_id="sampled-summary"))
            with gr.Tab("Inpaint", elem_id="inpaint") as inpaint_tab, gr.Row():
                with gr.Column(scale=2, min_width=330):
                    editor = _editor(session, scale)
                    with gr.Row():
                        new_image = gr.Button("New image", min_width=100, elem_id="another")
                        inpaint = gr.Button(
                            "Inpaint", variant="primary", min_width=100, elem_id="change"
                        )
                    part = gr.Radio(
                        [("painted part", "mask"), ("whole image", "all")],
                        value="mask",
                        label="Replace",
                        elem_id="part",
                    )
                    strength = gr.Slider(
                        0.05,
                        1,
                        1,
                        step=0.05,
                        label="Strength (1 ignores the old image)",
                        elem_id="strength",
                    )
                with gr.Column(scale=3, min_width=420):
                    inpainted = [*_sides("changed"), gr.HTML(elem_id="changed-summary")]
            with gr.Tab("Velocity") as velocity_tab:
                curve = gr.HTML(elem_id="curve")
    return Components(
        tab,
        source,
        number,
        controls,
        next_seed,
        error,
        sample_tab,
        sampled,
        inpaint_tab,
        editor,
        new_image,
        inpaint,
        part,
        strength,
        inpainted,
        velocity_tab,
        curve,
    )


def _controls(session: DemoSession, guidance: float) -> tuple[list[Any], gr.Button]:
    """One control per field of Request, in its order; and the button for the next seed."""
    names = list(session.plans)
    known = session.model.class_names
    numbers = [(known[i] if known else str(i), i) for i in range(session.model.num_classes)]
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
        [("each in turn", "cycle"), ("random", "random"), *numbers],
        value="cycle",
        label="Class",
        elem_id="class",
    )
    count = gr.Slider(
        1, session.max_images, min(10, session.max_images), step=1, label="Images", elem_id="images"
    )
    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    next_seed = gr.Button("Next seed", size="sm", elem_id="next")
    scale = gr.Slider(
        1,
        max(6.0, guidance),
        guidance,
        step=0.1,
        label="Guidance",
        interactive=session.model.null_class is not None,
        elem_id="guidance",
    )
    with gr.Accordion("Guidance interval", open=False):
        low = gr.Slider(0, 1, 0, step=0.05, label="from t (0: noise)")
        high = gr.Slider(0, 1, 1, step=0.05, label="to t (1: image)")
    return [*plans, classes, count, seed, scale, low, high], next_seed


def _sides(name: str) -> list[gr.HTML]:
    """Places for the results of plan A and plan B."""
    return [
        gr.HTML(show.side(side.upper(), None, []), elem_id=f"{name}-{side}", min_width=300)
        for side in "ab"
    ]


def _editor(session: DemoSession, scale: int) -> gr.ImageEditor:
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
        canvas_size=(session.width * scale, session.height * scale),
        elem_id="editor",
    )
    cache = editor.async_move_resource_to_block_cache

    async def cache_uploads_only(name: Any) -> str | None:
        """gradio itself would let a request make the server fetch any address."""
        if "://" in str(name):
            raise ValueError("image must be uploaded, got an address")
        return await cache(name)

    editor.async_move_resource_to_block_cache = cache_uploads_only  # type: ignore[method-assign, assignment]
    return editor
