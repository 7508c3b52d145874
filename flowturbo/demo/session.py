"""The demo's session: requests are checked, bounded and served one at a time.

One at a time, so that no other request falsifies the milliseconds.
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
from ..runtime.device import device_name, seconds
from ..sampling.edit import edit, image_size, inpaint
from ..sampling.generate import class_labels
from ..sampling.inputs import noise_of
from ..sampling.run import Callback, StepInfo
from ..sampling.sampler import sample
from ..solver.plan import Plan
from ..storage.images import fitted

RUNS = 5
"""Most timed runs per plan; their median is reported."""
TIMING_SECONDS = 1.0
"""After this time no further timed run starts, so a slow model is timed once."""
PREVIEW_SHARE = 0.25
"""Largest share of a run's time that its previews take."""
PICTURES = 2**32
"""Index of the first image sampled for inpainting, above those of all compared images."""
CURVE_IMAGES, CURVE_STEPS = 10, 40
MAX_PIXELS, MAX_ASPECT_RATIO = 4096 * 4096, 8
"""Bounds on uploaded images; resizing very long ones would take disproportionate memory."""


class Request(NamedTuple):
    """The values of the page's controls.

    plan_a, plan_b: names of offered plans, or letters.
    classes: a class number for all images, or "cycle" or "random" as in `class_labels`.
    low, high: the guidance interval.
    """

    plan_a: str
    plan_b: str
    classes: int | Literal["cycle", "random"]
    images: int
    seed: int
    guidance: float
    low: float = 0.0
    high: float = 1.0


class Speed(NamedTuple):
    """seconds: for one batch, the median of `runs` runs."""

    seconds: float
    runs: int


class Side(NamedTuple):
    """The result of one plan so far.

    images (N, height, width, 3) uint8 on the CPU: the prediction after `step` of the plan's steps,
        at the end the result.
    """

    plan: Plan
    step: int = 0
    images: Tensor | None = None
    speed: Speed | None = None


class Comparison(NamedTuple):
    """The results so far of two plans from the same noise.

    labels, names: the numbers of the images' classes, and what they are called.
    """

    labels: list[int]
    names: list[str]
    a: Side
    b: Side

    @property
    def rms(self) -> float | None:
        """The RMS difference of the images, of 255 levels; None until both are finished."""
        finished = all(
            side.images is not None and side.step == len(side.plan) for side in (self.a, self.b)
        )
        return rms_distance(self.a.images, self.b.images) if finished else None  # type: ignore[arg-type]


class ClientGone(Exception):
    """The client has disconnected, or the session is closed."""


class DemoSession:
    """A model with a VAE, and the requests of visitors to it.

    plans: offered name -> the plan if it comes from a file, None if the name is the plan's letters.
        Visitors send these names or other letters; their text is never taken for a file's name.
    name: of the model, as the page shows it.
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
        # A single thread: torch keeps a thread pool per calling thread, and several pools compete.
        self._worker = ThreadPoolExecutor(1, "demo-session")
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop the current request at its next step, and drop those that wait."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def about(self) -> str:
        """A description of the model and the machine."""
        refiner = "a refiner" if self.model.refiner is not None else "no refiner"
        images = (
            f"{self.model.num_classes} classes, images of {self.height} x {self.width}, {refiner}"
        )
        return (
            f"{self.name}: {images}. {device_name(self.model.device)}, "
            f"{str(self.model.dtype).removeprefix('torch.')}."
        )

    def plan(self, text: str, interval: tuple[float, float] = (0.0, 1.0)) -> Plan:
        """An offered plan, or one in letters on the model's own time grid.

        ValueError or TypeError for any other text, and for a plan that is too long or needs a
        refiner that is missing.
        """
        loaded = self.plans.get(text) if isinstance(text, str) else None
        if loaded is None:
            plan = Plan.parse(text, shift=self.model.shift, guidance_interval=interval)
        elif interval == (0.0, 1.0):
            plan = loaded
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

    def class_name(self, number: int) -> str:
        """What visitors read of a class: its name, or "class 7"."""
        return self.model.class_name(number) or f"class {number}"

    def labels(self, request: Request) -> list[int]:
        """The class of each image; ValueError or TypeError for a request out of bounds."""
        count, seed = whole("images", request.images), natural("seed", request.seed)
        if not 1 <= count <= self.max_images:
            raise ValueError(
                f"images must be from 1 to {self.max_images} in this demo, got {count}"
            )
        if isinstance(request.classes, str):
            return class_labels(request.classes, count, self.model.num_classes, seed).tolist()
        return [whole("class", request.classes)] * count

    def sample(self, request: Request) -> Iterator[Comparison]:
        """Sample by both plans: previews, then the images, then the milliseconds.

        The images are those of `flowturbo.sample`, to the bit.
        """
        labels = self.labels(request)
        yield from self._compare(
            request, labels, partial(sample, self.model, labels=labels, **_options(request))
        )

    def change(
        self, request: Request, image: np.ndarray, mask: np.ndarray | None, strength: float
    ) -> Iterator[Comparison]:
        """Inpaint by both plans as `flowturbo.inpaint`, or without a mask edit as `flowturbo.edit`.

        image (height, width, 3) uint8; mask (height, width) bool.
        """
        labels = self.labels(request)
        options: dict[str, Any] = dict(
            images=image[None], labels=labels, strength=strength, **_options(request)
        )
        run = (
            partial(edit, self.model, **options)
            if mask is None
            else partial(inpaint, self.model, mask=mask, **options)
        )
        yield from self._compare(request, labels, run)

    def picture(self, request: Request, number: int) -> np.ndarray:
        """Sample image `number` to inpaint, by plan A -> (height, width, 3) uint8.

        It has the requested class, or with "cycle" and "random" class number % num_classes. Its
        noise is not that of the inpainting, which would bring back what it replaces.
        """
        plan, _ = self._plans(request)
        label = (
            number % self.model.num_classes if isinstance(request.classes, str) else request.classes
        )
        noise = noise_of(self.model, request.seed, [PICTURES + number])
        options = {**_options(request), "noise": noise}
        return (
            self._worker.submit(sample, self.model, plan, label, **options)
            .result()[0]
            .cpu()
            .numpy()
            .copy()
        )

    def curve(self, guidance: float) -> bytes:
        """The plot of `velocity_curve` as a PNG file, cached for each guidance scale."""
        self.model.guided(finite("guidance", guidance))
        return self._worker.submit(self._curve, guidance).result()

    def _draw_curve(self, guidance: float) -> bytes:
        file = io.BytesIO()
        curve = velocity_curve(
            self.model,
            guidance=guidance,
            steps=CURVE_STEPS,
            images=CURVE_IMAGES,
            batch_size=CURVE_IMAGES,
        )
        plot_velocity(curve, file)
        return file.getvalue()

    def fitted(self, image: Image.Image) -> np.ndarray:
        """A visitor's image, cropped and resized to the model's (height, width, 3), uint8.

        ValueError for a huge or a very long image.
        """
        width, height = image.size
        too_long = max(width, height) > MAX_ASPECT_RATIO * min(width, height)
        if too_long or width * height > MAX_PIXELS:
            raise ValueError(
                f"image must have at most {MAX_PIXELS} pixels and be at most {MAX_ASPECT_RATIO} "
                f"times as long as wide, got {width} x {height}"
            )
        return fitted(image, self.height).copy()

    def painted(self, paint: np.ndarray) -> np.ndarray:
        """The image's pixels of which at least a quarter is painted, (height, width) bool.

        paint: the opacity of the drawing, uint8, of any height and width.
        """
        share = Image.fromarray(paint).resize((self.width, self.height), Image.Resampling.BOX)
        return np.asarray(share) >= 63

    def _plans(self, request: Request) -> list[Plan]:
        interval = (
            finite("guidance_interval", request.low),
            finite("guidance_interval", request.high),
        )
        plans = []
        for name, text in (("A", request.plan_a), ("B", request.plan_b)):
            try:
                plans.append(self.plan(text, interval))
            except (ValueError, TypeError) as error:
                raise type(error)(f"Plan {name}: {error}") from None
        return plans

    def _compare(
        self, request: Request, labels: list[int], run: Callable[..., Tensor]
    ) -> Iterator[Comparison]:
        """run: (plan=, callback=) -> images."""
        plans = self._plans(request)
        names = list(map(self.class_name, labels))

        def work(show: Callable[[Comparison], None]) -> None:
            sides = [Side(plan) for plan in plans]

            def update(k: int, side: Side) -> None:
                sides[k] = side
                show(Comparison(labels, names, *sides))

            for k, plan in enumerate(plans):
                images = run(plan=plan, callback=self._previews(partial(update, k), plan)).cpu()
                update(k, Side(plan, len(plan), images))
            for k, speed in enumerate(self._speeds([partial(run, plan=plan) for plan in plans])):
                update(k, sides[k]._replace(speed=speed))

        yield from self._stream(work)

    def _previews(self, update: Callable[[Side], None], plan: Plan) -> Callback:
        """A callback that decodes predictions, as often as PREVIEW_SHARE of the time allows."""
        due = 0.0

        def callback(info: StepInfo) -> None:
            nonlocal due
            start = time.perf_counter()
            if info.step < len(plan) and start >= due:
                update(Side(plan, info.step, self.model.decode(info.denoised).cpu()))
                now = time.perf_counter()
                due = now + (now - start) / PREVIEW_SHARE

        return callback

    def _speeds(self, runs: list[Callable[[], Tensor]]) -> list[Speed]:
        """Time the runs in turns, so that other load on the machine affects all alike."""
        if self.model.device.type == "cuda":
            for run in [*runs, *runs]:  # the second run of a kind is captured as a graph
                run()
        times: list[list[float]] = [[] for _ in runs]
        end = time.perf_counter() + TIMING_SECONDS
        while len(times[0]) < RUNS and (not times[0] or time.perf_counter() < end):
            for run, run_times in zip(runs, times, strict=True):
                if self._closed.is_set():
                    raise ClientGone
                run_times.append(seconds(run, self.model.device))
        return [Speed(statistics.median(run_times), len(run_times)) for run_times in times]

    def _stream(self, work: Callable[[Callable[[Comparison], None]], None]) -> Iterator[Comparison]:
        """Run work(show) in the worker and yield what it shows, skipping all but the newest.

        `show` raises ClientGone once this generator is closed, which ends the work.
        """
        states: queue.SimpleQueue[Comparison | None] = queue.SimpleQueue()
        gone = threading.Event()

        def show(state: Comparison) -> None:
            if gone.is_set() or self._closed.is_set():
                raise ClientGone
            states.put(state)

        def run() -> None:
            with suppress(ClientGone):
                work(show)

        task = self._worker.submit(run)
        task.add_done_callback(lambda _: states.put(None))
        try:
            running = True
            while running:
                pending = [states.get()]
                while not states.empty():
                    pending.append(states.get())
                running = pending[-1] is not None
                comparisons = [state for state in pending if state is not None]
                if comparisons:
                    yield comparisons[-1]
            task.result()
        finally:
            gone.set()


def _options(request: Request) -> dict[str, Any]:
    return dict(guidance=request.guidance, seed=request.seed, output="uint8")
