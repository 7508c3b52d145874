"""What the demo's page shows of images and milliseconds, as HTML. Pictures are in it losslessly;
nothing is fetched.
"""

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
"""Images under so many pixels are enlarged, each pixel a square; larger ones are shown larger."""


def title(about: str) -> str:
    return f'<div class="ft-title"><b>flowturbo</b><span>{html.escape(about)}</span></div>'


def curve(plot: bytes, guidance: float) -> str:
    """The plot of the velocity, and what it is of."""
    return (
        f'<div class="ft-curve"><img src="{png(plot)}" alt="the velocity\'s curve"></div>'
        f'<div class="ft-note">The predictor\'s velocity along {CURVE_IMAGES} trajectories of '
        f"{CURVE_STEPS} Heun steps, guidance "
        f"{guidance:g}. Where it hardly changes, a step may take the last velocity instead of a "
        "new one (P), or mend it by a small "
        "network (R).</div>"
    )


def picture(image: np.ndarray) -> str:
    """(height, width, 3) uint8 -> a data: URL of it as a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return png(file.getvalue())


def png(data: bytes) -> str:
    """A data: URL of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def side(name: str, found: Side | None, labels: list[int]) -> str:
    """Plan A or B: its calls, its images as far as they are, and milliseconds an image once they
    are known.
    """
    badge = f'<span class="ft-name">{name}</span>'
    if found is None:
        return f'<div class="ft-side">{badge}</div>'
    cost = found.plan.cost
    calls = f"{cost.predictor} predictor calls" + (
        f", {cost.refiner} refiner calls" if cost.refiner else ""
    )
    kind = ""
    figures = []
    if found.images is not None:
        pixels = found.images.numpy()
        kind = "ft-small" if min(pixels.shape[1:3]) < _SMALL else "ft-large"
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            said = f"class {label}"
            figures.append(
                f'<figure><img src="{picture(image)}" alt="image {i}, '
                f'{said}"><figcaption>{said}</figcaption></figure>'
            )
    share = 100 * found.step / len(found.plan)
    return (
        f'<div class="ft-side" data-done="{str(found.speed is not None).lower()}"><div '
        'class="ft-head">'
        f'<div class="ft-plan">{badge}{html.escape(str(found.plan))}<span '
        f'class="ft-calls">{calls}</span></div>'
        f'<div class="ft-speed">{_speed(found, len(labels))}</div></div>'
        f'<div class="ft-bar"><div style="width: {share:.0f}%"></div></div>'
        f'<div class="ft-images {kind}">{"".join(figures)}</div></div>'
    )


def _speed(found: Side, count: int) -> str:
    if found.speed is None:
        done = found.step == len(found.plan)
        text = "measuring ..." if done else f"step {found.step} of {len(found.plan)}"
        return f"<small>{text}</small>"
    return f"<b>{_figures(1e3 * found.speed.seconds / count)}</b> ms an image"


def _figures(value: float) -> str:
    """Three significant figures, without a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def summary(found: Comparison) -> str:
    """The two plans against each other, and what the milliseconds are of."""
    if found.rms is None or found.a.speed is None or found.b.speed is None:
        return '<div class="ft-sum">&nbsp;</div><div class="ft-note">&nbsp;</div>'
    ratio = found.b.speed.seconds / found.a.speed.seconds
    level = 0.95 < ratio < 1.05  # closer is nothing that so few runs tell
    faster, slower = ("A", "B") if ratio > 1 else ("B", "A")
    speed = (
        "Both take about the same time"
        if level
        else f"{faster} is {max(ratio, 1 / ratio):.1f} times as fast as {slower}"
    )
    runs, count = found.a.speed.runs, len(found.labels)
    return (
        '<div class="ft-sum">From the same noise, the images of A and B differ by '
        f"<b>{_figures(found.rms)}</b> of 255 levels "
        f"(root mean square). {speed}.</div>"
        f'<div class="ft-note">Milliseconds: median of {runs} {"runs" if runs > 1 else "run"} of '
        f"{count} "
        f"image{'s' if count > 1 else ''} at a time, A and B in turn, decoding included; the "
        "previews are of a run that is not "
        "timed.</div>"
    )


def error_box(message: str) -> str:
    """A message of several lines as it stands, whatever is in it."""
    return f'<pre class="ft-error">{html.escape(message)}</pre>' if message else ""
