"""The events of the demo's page: what each control asks of the session, and what it updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from . import html as show
from .session import Comparison, DemoSession, Request

SHOWN_ERRORS = (ValueError, TypeError, RuntimeError, FloatingPointError)
"""Errors whose message is shown to visitors; that of others may hold private details."""


class Components(NamedTuple):
    """The components that events read or write. sampled, inpainted: plan A, plan B, summary."""

    tab: gr.State
    source: gr.State
    number: gr.State
    controls: list[Any]
    next_seed: gr.Button
    error: gr.HTML
    sample_tab: gr.Tab
    sampled: list[gr.HTML]
    inpaint_tab: gr.Tab
    editor: gr.ImageEditor
    new_image: gr.Button
    inpaint: gr.Button
    part: gr.Radio
    strength: gr.Slider
    inpainted: list[gr.HTML]
    velocity_tab: gr.Tab
    curve: gr.HTML


def connect(blocks: gr.Blocks, c: Components, handlers: Handlers) -> None:
    """Attach the events to the components; called while `blocks` is open."""
    # One request at a time: two would share the machine and falsify each other's milliseconds.
    model: dict[str, Any] = dict(
        concurrency_limit=1,
        concurrency_id="model",
        api_visibility="private",
        show_progress="hidden",
    )
    quick: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
    sample = (handlers.sample, [c.tab, *c.controls], [*c.sampled, c.error])
    in_editor = [c.source, c.editor, c.error]
    seed, guidance = (c.controls[Request._fields.index(name)] for name in ("seed", "guidance"))
    velocity = (handlers.velocity, [c.tab, guidance], [c.curve, c.error])
    # Not `change`, which also fires for the initial values.
    gr.on(
        [blocks.load, *(control.input for control in c.controls)],
        *sample,
        trigger_mode="always_last",
        **model,
    )
    c.next_seed.click(lambda seed: (seed or 0) + 1, seed, seed, **quick).then(
        *sample, trigger_mode="always_last", **model
    )
    c.sample_tab.select(lambda: "sample", None, c.tab, **quick).then(*sample, **model)
    c.inpaint_tab.select(lambda: "inpaint", None, c.tab, **quick).then(
        handlers.first_image, [c.source, c.number, *c.controls], [c.number, *in_editor], **model
    )
    c.new_image.click(
        handlers.new_image,
        [c.number, *c.controls],
        [c.number, *in_editor],
        trigger_mode="once",
        **model,
    )
    c.editor.upload(handlers.upload, [c.editor, c.source], in_editor, **model)
    c.editor.clear(lambda: None, None, c.source, **quick)
    c.inpaint.click(
        handlers.inpaint,
        [c.editor, c.source, c.part, c.strength, *c.controls],
        [*c.inpainted, c.error],
        trigger_mode="once",
        **model,
    )
    c.velocity_tab.select(lambda: "velocity", None, c.tab, **quick).then(*velocity, **model)
    guidance.input(*velocity, trigger_mode="always_last", **model)


class Handlers:
    """The functions behind the events.

    controls: the values of a Request, in its order. scale: screen pixels per pixel in the editor.
    """

    def __init__(self, session: DemoSession, scale: int) -> None:
        self.session, self.scale = session, scale

    def sample(self, tab: str, *controls: Any) -> Iterator[Any]:
        if tab == "sample":
            yield from _outputs(lambda: self.session.sample(Request(*controls)))
        else:
            yield gr.skip()

    def inpaint(
        self,
        painted: dict[str, Any] | None,
        image: np.ndarray | None,
        part: str,
        strength: float,
        *controls: Any,
    ) -> Iterator[Any]:
        def run() -> Iterator[Comparison]:
            if image is None:
                raise ValueError("image must be sampled or uploaded first")
            mask = self.session.painted(_opacity(painted)) if part == "mask" else None
            return self.session.change(Request(*controls), image, mask, strength)

        yield from _outputs(run)

    def new_image(self, number: int, *controls: Any) -> tuple[Any, ...]:
        """A sampled image to paint on, with the number of the next one."""
        request = Request(*controls)
        return number + 1, *_or_error(
            lambda: self._in_editor(self.session.picture(request, number)), 3
        )

    def first_image(self, image: np.ndarray | None, number: int, *controls: Any) -> tuple[Any, ...]:
        return self.new_image(number, *controls) if image is None else (gr.skip(),) * 4

    def upload(self, painted: dict[str, Any], image: np.ndarray | None) -> tuple[Any, ...]:
        background = painted["background"]
        # The editor also fires this event for images that the server put into it.
        if background is None or (
            image is not None and np.array_equal(background[..., :3], _enlarged(image, self.scale))
        ):
            return (gr.skip(),) * 3
        return _or_error(
            lambda: self._in_editor(self.session.fitted(Image.fromarray(background))), 3
        )

    def velocity(self, tab: str, guidance: float) -> tuple[Any, ...]:
        if tab != "velocity":
            return gr.skip(), gr.skip()
        return _or_error(
            lambda: (show.curve(self.session.curve(guidance), guidance), _no_error()), 2
        )

    def _in_editor(self, image: np.ndarray) -> tuple[Any, ...]:
        """The image, the editor's value with it as background, and no error."""
        background = _enlarged(image, self.scale)
        return image, {"background": background, "layers": [], "composite": None}, _no_error()


def _enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    """(height, width, 3) -> (scale height, scale width, 3), each pixel a square."""
    return np.kron(image, np.ones((scale, scale, 1), np.uint8))


def _opacity(painted: dict[str, Any] | None) -> np.ndarray:
    """The opacity of all that was drawn, (height, width) uint8."""
    layers = [layer[..., 3] for layer in (painted or {}).get("layers") or []]
    return np.max(layers, axis=0) if layers else np.zeros((1, 1), np.uint8)


def _outputs(run: Callable[[], Iterator[Comparison]]) -> Iterator[tuple[Any, ...]]:
    """Updates of both sides, the summary and the error; an error leaves the others as they are."""
    try:
        for comparison in run():
            sides = (
                show.side(name, side, comparison.names)
                for name, side in (("A", comparison.a), ("B", comparison.b))
            )
            yield *sides, show.summary(comparison), _no_error()
    except SHOWN_ERRORS as error:
        yield gr.skip(), gr.skip(), gr.skip(), _error(error)


def _or_error(run: Callable[[], tuple[Any, ...]], count: int) -> tuple[Any, ...]:
    """The `count` outputs of `run`, or a message in the last of them, which is the error."""
    try:
        return run()
    except SHOWN_ERRORS as error:
        return *(gr.skip() for _ in range(count - 1)), _error(error)


def _error(error: Exception) -> Any:
    return gr.HTML(show.error_box(str(error)), visible=True)


def _no_error() -> Any:
    return gr.HTML("", visible=False)
