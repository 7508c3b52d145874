"""What the demo's page asks of a model: checked, bounded, and one thing at a time, so that
milliseconds are of nothing else.
"""

from __future__ import annotations

import io
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..checks import finite, natural, whole
from ..evaluation.metrics import rms_distance
from ..evaluation.plots import plot_velocity
from ..evaluation.velocity import velocity_curve
from ..models.flow_model import FlowModel
from ..runtime import rng
from ..runtime.device import device_name, seconds
from ..sampling.edit import edit, image_size, inpaint
from ..sampling.generate import class_labels
from ..sampling.run import Callback, StepInfo
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..storage.images import fitted

RUNS = 5
"""Timed runs of a plan at most; their median counts."""
TIMING_SECONDS = 1.0
"""After so long no further timed runs are begun: a slow model is timed once."""
PREVIEW_SHARE = 0.25
"""Of the time of the run they are made of, previews take no more."""
PICTURES = 2**32
"""The number of the first image that is made to be inpainted: above all that are compared."""
CURVE_IMAGES, CURVE_STEPS = 10, 40
MOST_PIXELS, LONGEST_SHAPE = 4096 * 4096, 8
"""Of an image that a visitor brings: fitting longer ones takes memory out of proportion."""


class Request(NamedTuple):
    """What a visitor chose. plan_a, plan_b: names of plans offered, or letters. classes: a class
    number for all images, or "cycle" or "random" as in class_labels. low, high: the times between
    which guidance is on."""

    plan_a: str
    plan_b: str
    classes: int | Literal["cycle", "random"]
    images: int
    seed: int
    guidance: float
    low: float = 0.0
    high: float = 1.0


class Speed(NamedTuple):
    """seconds: of a batch, the median of so many runs."""

    seconds: float
    runs: int


class Side(NamedTuple):
    """What one plan made. images (N, height, width, 3) uint8 on the CPU: where it heads for, after
    `step` of the plan's steps.
    """

    plan: Plan
    step: int = 0
    images: Tensor | None = None
    speed: Speed | None = None


class Comparison(NamedTuple):
    """Two plans from the same noise, as far as they are. labels: of the images."""

    labels: list[int]
    a: Side
    b: Side

    @property
    def rms(self) -> float | None:
        """How far the images are from each other, in levels of 255; None before both are made."""
        done = all(
            side.images is not None and side.step == len(side.plan) for side in (self.a, self.b)
        )
        return rms_distance(self.a.images, self.b.images) if done else None  # type: ignore[arg-type]


class ClientGone(Exception):
    """Nobody looks any more."""


class DemoSession:
    """A model that decodes, and what a visitor may ask of it.

    plans: the names of those offered, and the plan where the name is that of a file. Visitors name
        these, or write letters: nothing that they write is taken for a file's name. name: of the
        model, for people.
    """

    def __init__(
        self,
        model: FlowModel,
        plans: Mapping[str, Plan | None],
        *,
        max_images: int = 16,
        max_steps: int = 64,
        name: str = "A model",
    ) -> None:
        self.model, self.plans, self.name = model, plans, name
        self.max_images, self.max_steps = max_images, max_steps
        self.height, self.width = image_size(model)
        self._curve = lru_cache(maxsize=64)(self._draw_curve)
        # One thread: torch keeps a team of threads for each that calls it, and several teams get in
        # each other's way.
        self._worker = ThreadPoolExecutor(1, "studio")
        self._closed = threading.Event()

    def close(self) -> None:
        """End what is under way at its next step."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def about(self) -> str:
        """The model and the machine, in words."""
        refiner = "a refiner" if self.model.refiner is not None else "no refiner"
        images = (
            f"{self.model.num_classes} classes, images of {self.height} x {self.width}, {refiner}"
        )
        return (
            f"{self.name}: {images}. {device_name(self.model.device)}, "
            f"{str(self.model.dtype).removeprefix('torch.')}."
        )

    def plan(self, text: str, interval: tuple[float, float] = (0.0, 1.0)) -> Plan:
        """A plan offered, or one in letters, on the model's own grid. ValueError or TypeError for
        any other, and for long ones.
        """
        found = self.plans.get(text) if isinstance(text, str) else None
        if found is None:
            plan = Plan.parse(text, shift=self.model.shift, guidance_interval=interval)
        elif interval == (0.0, 1.0):
            plan = found
        else:
            raise ValueError(
                "a plan's file holds its guidance interval: leave guidance on from 0 to 1"
            )
        if len(plan) > self.max_steps:
            raise ValueError(
                f"plan must have at most {self.max_steps} steps in this demo, got {len(plan)}"
            )
        if plan.cost.refiner and self.model.refiner is None:
            raise ValueError(f"plan {plan} has refiner steps, but the model has no refiner")
        return plan

    def labels(self, asked: Request) -> list[int]:
        """One an image."""
        count, seed = whole("images", asked.images), natural("seed", asked.seed)
        if not 1 <= count <= self.max_images:
            raise ValueError(
                f"images must be from 1 to {self.max_images} in this demo, got {count}"
            )
        if isinstance(asked.classes, str):
            return class_labels(asked.classes, count, self.model.num_classes, seed).tolist()
        return [whole("class", asked.classes)] * count

    def sample(self, asked: Request) -> Iterator[Comparison]:
        """Images of both plans as they come about, and their speed in the end: those of
        `flowturbo.sample`, to the bit.
        """
        labels = self.labels(asked)
        yield from self._compare(
            asked, labels, partial(sample, self.model, labels=labels, **_options(asked))
        )

    def change(
        self, asked: Request, image: np.ndarray, mask: np.ndarray | None, strength: float
    ) -> Iterator[Comparison]:
        """The same of `flowturbo.inpaint`, or of `edit` where there is no mask.

        image (height, width, 3) uint8; mask (height, width) bool.
        """
        labels = self.labels(asked)
        how: dict[str, Any] = dict(
            images=image[None], labels=labels, strength=strength, **_options(asked)
        )
        run = (
            partial(edit, self.model, **how)
            if mask is None
            else partial(inpaint, self.model, mask=mask, **how)
        )
        yield from self._compare(asked, labels, run)

    def picture(self, asked: Request, number: int) -> np.ndarray:
        """(height, width, 3) uint8: an image by plan A to inpaint; of the class asked, or of one
        after the other.

        Not of the noise that inpainting begins with, which would bring back what it replaces.
        """
        plan, _ = self._plans(asked)
        label = number % self.model.num_classes if isinstance(asked.classes, str) else asked.classes
        noise = rng.noise(self.model.latent_shape, asked.seed, [PICTURES + number])
        options = {**_options(asked), "noise": noise}
        return (
            self._worker.submit(sample, self.model, plan, label, **options)
            .result()[0]
            .cpu()
            .numpy()
            .copy()
        )

    def curve(self, guidance: float) -> bytes:
        """The plot of `velocity_curve` as a PNG. Kept for each guidance scale."""
        self.model.guided(finite("guidance", guidance))
        return self._worker.submit(self._curve, guidance).result()

    def _draw_curve(self, guidance: float) -> bytes:
        file = io.BytesIO()
        measured = velocity_curve(
            self.model,
            guidance=guidance,
            steps=CURVE_STEPS,
            images=CURVE_IMAGES,
            batch_size=CURVE_IMAGES,
        )
        plot_velocity(measured, file)
        return file.getvalue()

    def fitted(self, image: Image.Image) -> np.ndarray:
        """A visitor's image -> (height, width, 3) uint8, cropped and resized. ValueError for a huge
        or a very long one.
        """
        width, height = image.size
        if width * height > MOST_PIXELS or max(width, height) > LONGEST_SHAPE * min(width, height):
            raise ValueError(
                f"image must have at most {MOST_PIXELS} pixels and be at most {LONGEST_SHAPE} "
                "times as long as wide, "
                f"got {width} x {height}"
            )
        return fitted(image, self.height).copy()

    def painted(self, paint: np.ndarray) -> np.ndarray:
        """paint (any height, any width) uint8, the opacity of what was drawn over an image ->
        (height, width) bool: the image's pixels of which at least a quarter is covered."""
        share = Image.fromarray(paint).resize((self.width, self.height), Image.Resampling.BOX)
        return np.asarray(share) >= 63

    def _plans(self, asked: Request) -> list[Plan]:
        interval = (finite("guidance_interval", asked.low), finite("guidance_interval", asked.high))
        plans = []
        for name, text in (("A", asked.plan_a), ("B", asked.plan_b)):
            try:
                plans.append(self.plan(text, interval))
            except (ValueError, TypeError) as error:
                raise type(error)(f"Plan {name}: {error}") from None
        return plans

    def _compare(
        self, asked: Request, labels: list[int], run: Callable[..., Tensor]
    ) -> Iterator[Comparison]:
        """run: (plan=, callback=) -> images."""
        plans = self._plans(asked)

        def work(show: Callable[[Comparison], None]) -> None:
            sides = [Side(plan) for plan in plans]

            def put(k: int, side: Side) -> None:
                sides[k] = side
                show(Comparison(labels, *sides))

            for k, plan in enumerate(plans):
                images = run(plan=plan, callback=self._previews(partial(put, k), plan)).cpu()
                put(k, Side(plan, len(plan), images))
            for k, speed in enumerate(self._speeds([partial(run, plan=plan) for plan in plans])):
                put(k, sides[k]._replace(speed=speed))

        yield from self._watched(work)

    def _previews(self, put: Callable[[Side], None], plan: Plan) -> Callback:
        due = 0.0

        def callback(info: StepInfo) -> None:
            nonlocal due
            began = time.perf_counter()
            if info.step < len(plan) and began >= due:
                put(Side(plan, info.step, self.model.decode(info.denoised).cpu()))
                now = time.perf_counter()
                due = now + (now - began) / PREVIEW_SHARE

        return callback

    def _speeds(self, runs: list[Callable[[], Tensor]]) -> list[Speed]:
        """Each in turn, so that whatever else the machine does meets all alike; nobody watches."""
        if self.model.device.type == "cuda":
            for run in [*runs, *runs]:  # the second run of a kind is captured as a graph
                run()
        times: list[list[float]] = [[] for _ in runs]
        end = time.perf_counter() + TIMING_SECONDS
        while len(times[0]) < RUNS and (not times[0] or time.perf_counter() < end):
            for run, found in zip(runs, times, strict=True):
                if self._closed.is_set():
                    raise ClientGone
                found.append(seconds(run, self.model.device))
        return [Speed(statistics.median(found), len(found)) for found in times]

    def _watched(
        self, work: Callable[[Callable[[Comparison], None]], None]
    ) -> Iterator[Comparison]:
        """What work shows while it runs in the worker, the newest where several are waiting. It
        ends when nobody looks any more.
        """
        shown: queue.SimpleQueue[Comparison | None] = queue.SimpleQueue()
        left = threading.Event()

        def show(state: Comparison) -> None:
            if left.is_set() or self._closed.is_set():
                raise ClientGone
            shown.put(state)

        def run() -> None:
            with suppress(ClientGone):
                work(show)

        task = self._worker.submit(run)
        task.add_done_callback(lambda _: shown.put(None))
        try:
            going = True
            while going:
                waiting = [shown.get()]
                while not shown.empty():
                    waiting.append(shown.get())
                going = waiting[-1] is not None
                states = [state for state in waiting if state is not None]
                if states:
                    yield states[-1]
            task.result()
        finally:
            left.set()


def _options(asked: Request) -> dict[str, Any]:
    return dict(guidance=asked.guidance, seed=asked.seed, output="uint8")
