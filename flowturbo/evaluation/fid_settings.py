"""Settings of `flowturbo fid`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..checks import natural, positive
from ..models.headers import Guided, named_plans
from ..models.model_plans import find_unstaged
from .fid_report import TITLES


@dataclass(frozen=True)
class Fidelity(Guided):
    """Compute FID, sFID, inception score, precision and recall by ADM's protocol.

    With --samples it scores the images of a file or folder. With --model it samples --images images
    by each of the plans and scores them.
    """

    metrics: tuple[str, ...]
    """Any of fid, sfid, is, precision, recall, separated by commas or spaces."""
    reference: Path | None = None
    """An .npz in ADM's layout, such as VIRTUAL_imagenet256_labeled.npz, or a folder of images.
    Every metric but "is" needs it."""
    samples: Path | None = None
    """An .npz with arr_0 (N, height, width, 3) uint8, or a folder of such files or of images."""
    out: Path = Path("fidelity")
    """Folder for report.md, report.json and the features of all images.
    If it already holds results with the same settings, the run resumes.
    Metrics and plans may be added.
    """
    inception: Path | None = None
    """Inception's weights.
    Default: the file that FLOWTURBO_INCEPTION names, else the one in ~/.cache/flowturbo.
    """
    images: int | None = None
    """Number of images, from the first on. Default: all of --samples, or 50000 of --model."""
    model: str | None = None
    """A bundled name or a predictor's file, instead of --samples."""
    refiner: str | None = None
    """The refiner's file. A bundled model brings its own."""
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL or AutoencoderTiny, "pixels" (grey) or "rgb".
    Default: the one that the model's file names.
    """
    plans: tuple[str, ...] = ("H1P5R3",)
    """Plans to sample by, letters, .json files or names of plans in the model's file, each from
    the same noise.
    Image i has class i % (number of classes).
    """
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 means none.
    Default: what the model's file recommends, else 1.5.
    """
    guidance_channels: int | None = None
    """Apply guidance to this many channels, from the first on.
    Default: 3 of 4 for SiT's checkpoints, all for others.
    """
    seed: int = 0
    """Seed of the noise; that of image i is a function of (seed, i)."""
    batch_size: int = 50
    """Images per batch, in the model and in Inception."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the model. Inception always runs in float32.
    Default: bfloat16 on a GPU, float32 on the CPU.
    """
    device: str | None = None
    """"cuda" or "cpu". Default: a GPU if there is one."""

    def __post_init__(self) -> None:
        words = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        metrics = tuple(dict.fromkeys(" ".join(words).replace(",", " ").split()))
        object.__setattr__(self, "metrics", metrics)
        if not metrics or not set(metrics) <= set(TITLES):
            raise ValueError(
                f"metrics must be some of {', '.join(TITLES)}, got {', '.join(metrics) or 'none'}"
            )
        for name in ("reference", "samples", "out", "inception"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if (self.samples is None) == (self.model is None):
            raise ValueError(
                "give samples or a model to sample with, "
                f"{'one of them' if self.samples is None else 'not both'}"
            )
        if self.reference is None and metrics != ("is",):
            raise ValueError("reference must be given: all metrics but is compare with one")
        self.choose_guidance()
        natural("seed", self.seed)
        positive("batch_size", self.batch_size)
        if self.images is not None:
            positive("images", self.images)
        if isinstance(self.plans, str) or not self.plans:
            raise ValueError(f"plans must be a list of at least one plan, got {self.plans!r}")
        named = {} if self.model is None else named_plans(self.model, self.refiner)
        for plan in self.plans:
            find_unstaged(plan, named)
