"""HTML of the demo's results. Images are embedded as lossless data: URLs, so nothing is fetched."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

from .session import CURVE_IMAGES, CURVE_STEPS, Comparison, Side

CSS = """
.ft-title {display: flex; gap: 14px; align-items: baseline; padding: 4px 2px 0}
.ft-title b {font-size: 1.5rem; font-weight: 700}
.ft-title span {color: var(--neutral-500); font-size: .9rem}
.ft-side {border: 1px solid var(--border-color-primary); border-radius: 10px;
  padding: 14px 16px 12px; min-height: 140px;
  background: var(--background-fill-primary)}
.ft-head {display: flex; justify-content: space-between; align-items: baseline; gap: 12px;
  min-height: 42px; margin: 0}
.ft-plan {font-weight: 650; font-size: 1.05rem; overflow-wrap: anywhere}
.ft-name {background: var(--color-accent); color: white; border-radius: 5px; padding: 1px 8px;
  margin-right: 9px; font-size: .9rem}
.ft-calls, .ft-note, .ft-speed small {color: var(--neutral-500); font-size: .82rem}
.ft-calls {font-weight: 400; display: block}
.ft-speed {text-align: right; white-space: nowrap}
.ft-speed b {font-size: 1.7rem; font-weight: 650; font-variant-numeric: tabular-nums}
.ft-bar {height: 3px; margin: 6px 0 10px; background: var(--border-color-primary);
  border-radius: 2px}
.ft-bar div {height: 100%; background: var(--color-accent); border-radius: 2px}
.ft-images {display: grid; grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); gap: 8px}
.ft-images.ft-large {grid-template-columns: repeat(auto-fill, minmax(150px, 1fr))}
.ft-images figure {margin: 0; text-align: center; font-size: .78rem; color: var(--neutral-500)}
.ft-images img {width: 100%; border-radius: 4px; display: block; margin: 0 0 2px}
.ft-small img {image-rendering: pixelated}
.ft-sum {padding: 10px 2px 0; font-size: .95rem}
.ft-note {padding: 2px}
.ft-error {white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .85rem;
  color: #b3261e; background: #fdecea;
  border: 1px solid #f3b8b3; border-radius: 8px; padding: 10px 14px; margin: 0}
.ft-curve img {width: 100%; max-width: 1000px; border-radius: 8px}
"""
_SMALL = 96
"""Images of fewer pixels per side are drawn with square pixels; larger ones get more room."""


def title(about: str) -> str:
    """The page's heading, with the model and the machine in words."""
    return f'<div class="ft-title"><b>flowturbo</b><span>{html.escape(about)}</span></div>'


def curve(plot: bytes, guidance: float) -> str:
    """The plot of the velocity, a PNG file, with an explanation below."""
    return (
        f'<div class="ft-curve"><img src="{png(plot)}" alt="plot of the velocity"></div>'
        f'<div class="ft-note">The predictor\'s velocity along {CURVE_IMAGES} trajectories of '
        f"{CURVE_STEPS} Heun steps, guidance {guidance:g}. Where it hardly changes, a step can "
        "reuse the cached velocity (P), or correct it by a small network (R).</div>"
    )


def picture(image: np.ndarray) -> str:
    """image (height, width, 3) uint8 -> a data: URL of a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return png(file.getvalue())


def png(data: bytes) -> str:
    """A data: URL of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def side(name: str, result: Side | None, captions: list[str]) -> str:
    """The card of plan A or B: its calls, its images so far, and milliseconds once measured.

    result: None before the first step. captions: what the images' classes are called.
    """
    badge = f'<span class="ft-name">{name}</span>'
    if result is None:
        return f'<div class="ft-side">{badge}</div>'
    cost = result.plan.cost
    calls = f"{cost.predictor} predictor calls" + (
        f", {cost.refiner} refiner calls" if cost.refiner else ""
    )
    kind = ""
    figures = []
    if result.images is not None:
        pixels = result.images.numpy()
        kind = "ft-small" if min(pixels.shape[1:3]) < _SMALL else "ft-large"
        for i, (image, text) in enumerate(zip(pixels, captions, strict=True)):
            caption = html.escape(text)
            figures.append(
                f'<figure><img src="{picture(image)}" alt="image {i}, '
                f'{caption}"><figcaption>{caption}</figcaption></figure>'
            )
    percent = 100 * result.step / len(result.plan)
    return (
        f'<div class="ft-side" data-done="{str(result.speed is not None).lower()}"><div '
        'class="ft-head">'
        f'<div class="ft-plan">{badge}{html.escape(str(result.plan))}<span '
        f'class="ft-calls">{calls}</span></div>'
        f'<div class="ft-speed">{_speed(result, len(captions))}</div></div>'
        f'<div class="ft-bar"><div style="width: {percent:.0f}%"></div></div>'
        f'<div class="ft-images {kind}">{"".join(figures)}</div></div>'
    )


def _speed(side: Side, count: int) -> str:
    """Milliseconds per image, or the progress until they are measured."""
    if side.speed is None:
        finished = side.step == len(side.plan)
        text = "measuring ..." if finished else f"step {side.step} of {len(side.plan)}"
        return f"<small>{text}</small>"
    return f"<b>{_three_digits(1e3 * side.speed.seconds / count)}</b> ms an image"


def _three_digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def summary(comparison: Comparison) -> str:
    """The difference between the plans' images and times, and how the times were measured."""
    a, b = comparison.a, comparison.b
    if comparison.rms is None or a.speed is None or b.speed is None:
        return '<div class="ft-sum">&nbsp;</div><div class="ft-note">&nbsp;</div>'
    ratio = b.speed.seconds / a.speed.seconds
    equal = 0.95 < ratio < 1.05  # so few runs cannot resolve a smaller difference
    faster, slower = ("A", "B") if ratio > 1 else ("B", "A")
    speed = (
        "Both take about the same time"
        if equal
        else f"{faster} is {max(ratio, 1 / ratio):.1f} times as fast as {slower}"
    )
    runs, count = a.speed.runs, len(comparison.labels)
    return (
        '<div class="ft-sum">From the same noise, the images of A and B differ by '
        f"<b>{_three_digits(comparison.rms)}</b> of 255 levels (root mean square). {speed}.</div>"
        f'<div class="ft-note">Milliseconds: median of {runs} {"runs" if runs > 1 else "run"} of '
        f"{count} image{'s' if count > 1 else ''} at a time, A and B in turn, decoding included. "
        "Previews come from a separate run that is not timed.</div>"
    )


def error_box(message: str) -> str:
    """A message, escaped, with its line breaks."""
    return f'<pre class="ft-error">{html.escape(message)}</pre>' if message else ""
