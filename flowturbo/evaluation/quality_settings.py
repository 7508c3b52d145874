"""The settings of `flowturbo evaluate`, which are its flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checks import finite, natural, positive
from ..models.flow_model import FlowModel
from ..models.headers import recommended_guidance
from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from .statistics import BLOCKS

PLANS = (
    *("E1", "E2", "E3", "E4", "E8", "E16"),
    *("H1", "H2", "H3", "H4", "H6", "H8"),
    *(
        "H1P1",
        "H1P2",
        "H1P3",
        "H1P4",
        "H1P5",
        "H1P6",
        "H2P4",
        "H2P5",
        "H2P8",
        "H2P9",
        "H5P7",
        "H8P9",
    ),
    *("A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A13", "A18"),
    *("B3", "B4", "B5", "B6", "B7", "B8", "B9", "B12", "B13", "B17", "B26"),
    *("C5", "C8", "C12", "C18", "C26"),
    *("U3", "U4", "U5", "U6", "U7", "U8", "U13", "D4", "D5", "D7", "D8"),
    *("X2", "X3", "X4", "U4A1", "U5A2", "U5B2", "X1A5"),
    *(
        "H1R1",
        "H1R2",
        "H1P1R1",
        "H1P1R2",
        "H1P2R1",
        "H1P2R2",
        "H1P3R2",
        "H1P5R3",
        "H2P4R2",
        "H2P8R2",
        "H5P7R3",
        "H8P9R5",
    ),
    *("H1P2S1", "H1P5S3"),
    *("E1R1", "A2R1", "A3R1", "A4R1", "B5R1"),
)
"""Plans with refiner steps, the paper's and others, and rivals from each family at the same costs,
rounded down and up to whole predictor calls.

No plan starts with P: P4 and H1P3 make the same calls.
"""

CLASS_PLANS = (
    *("E1", "E2", "E3", "E4", "E6", "E8", "E12", "E30"),
    *("H1", "H2", "H3", "H4", "H6", "H15"),
    *("H1P1", "H1P2", "H1P3", "H1P4", "H1P6", "H1P10"),
    *("A2", "A3", "A4", "A5", "A6", "A7", "A8", "A12", "A30"),
    *("B3", "B4", "B5", "B6", "B7", "B8", "B12"),
    *("U3", "U4", "U5", "U6", "U7", "U8", "U12", "D4", "D5", "D6", "D8", "D12"),
    *("H1A3", "H1A5", "H1P2R1", "H1P3R2", "A3R1", "A4R1", "A6R1"),
)
"""Plans that are measured on a training set: rivals of each family at 1 to 30 calls."""

PRECISIONS = ("float32", "bfloat16", "fp8")


@dataclass(frozen=True)
class Evaluate:
    """Measure quality against cost for plans of a model.

    Without --data the model is one of digits. With --data it is any class-conditional model of
    pixels, which is compared with its training set and, with --held-out, with pictures that it
    never saw.

    Writes a table (Markdown and JSON) and a plot. For the digits the defaults take about 20 minutes
    on two idle cores; with --data choose plans and images by the time that you have. Other work on
    the machine makes the milliseconds meaningless.

    To compute FID for images of any kind, use `flowturbo fid`. Its former name, this command
    with --metrics, still works.
    """

    out: Path = Path("evaluation")
    """Folder for quality.md, quality.json, quality.png, the fine solutions, and a classifier.
    If it already holds results with the same settings, the run resumes.
    Plans may be added, with --data also guidance scales, intervals and precisions.
    """
    model: str = "digits"
    """A bundled name or a predictor's file."""
    refiner: str | None = None
    """The refiner's file. A bundled model brings its own."""
    data: str | None = None
    """The training set, with pixels in [-1, 1] as latents: an .npz, or a folder of shards.
    Default: the digits.
    """
    held_out: str | None = None
    """Pictures that were held out of the training, in the same form."""
    plans: tuple[str, ...] | None = None
    """Plans to measure, each from the same noise; with --data also names, files, stages.
    Default: rivals of each family, and plans with the refiner if there is one.
    """
    guidance: tuple[float, ...] = ()
    """Scale of classifier-free guidance; 1 means none.
    Default: what the model's file recommends, else 1.5.
    With --data several: each plan is measured at each.
    """
    guidance_intervals: tuple[tuple[float, float], ...] = ()
    """With --data: intervals of times with guidance; each plan is measured with each.
    Default: all times. Plans of files, by name and with stages keep their own.
    """
    precisions: tuple[str, ...] = ()
    """With --data: any of float32, bfloat16, fp8. Default: the device's own.
    The report compares plans in the first one that its folder was begun with.
    """
    images: int | None = None
    """Images per plan. Default: 2000 digits, with --data 10,000.
    The noise of image i is a function of (seed, i).
    Its class is i % 10, with --data so that any first images have the training set's shares.
    """
    reference_images: int = 500
    """How many of these images, from the first on, are compared with the fine solution."""
    reference_plan: str | None = None
    """Plan that computes the fine solution. Default: H200, with --data C80."""
    batch_size: int = 250
    """Images per batch. The first batch of a plan is not timed, so there must be at least two."""
    timed: bool = True
    """Time each plan. With --no-timed, which is for --data, there are no milliseconds.
    Then plans share the network calls that they have in common.
    """
    seed: int = 0
    """Seed of the noise."""
    classifier_steps: int | None = None
    """Training steps of the classifier in whose features distances are measured.
    Default: 1000, with --data 1500.
    """
    device: str | None = None
    """"cuda" (in bfloat16) or "cpu" (in float32). Default: a GPU if there is one."""

    def __post_init__(self) -> None:
        defaults = (2000, "H200", 1000) if self.data is None else (10_000, "C80", 1500)
        names = ("images", "reference_plan", "classifier_steps")
        for name, default in zip(names, defaults, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        given = self.guidance if isinstance(self.guidance, list | tuple) else (self.guidance,)
        given = given or (recommended_guidance(self.model, self.refiner),)
        object.__setattr__(self, "guidance", tuple(finite("guidance", scale) for scale in given))
        if len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance must be a list of scales, none twice, got {given}")
        natural("seed", self.seed)
        for name in ("images", "reference_images", "batch_size", "classifier_steps"):
            positive(name, getattr(self, name))
        self._check_counts()
        if self.data is None:
            self._check_digits()
        self._check_variants()
        if self.plans is not None and (isinstance(self.plans, str) or not self.plans):
            raise ValueError(f"plans must be a list of at least one plan, got {self.plans!r}")
        if self.data is None:
            self.chosen(None)
        if Plan.parse(str(self.reference_plan)).cost.refiner:
            raise ValueError(
                f"reference_plan must do without the refiner, got {self.reference_plan!r}"
            )

    def _check_counts(self) -> None:
        if self.count < 2 * self.batch_size:
            raise ValueError(
                f"images must be at least 2 * batch_size = {2 * self.batch_size} (the first batch "
                f"is not timed), got {self.images}"
            )
        if not 2 * BLOCKS <= self.reference_images <= self.count:
            raise ValueError(
                f"reference_images must be from {2 * BLOCKS} to images = {self.images}, got "
                f"{self.reference_images}"
            )

    def _check_digits(self) -> None:
        for name in ("held_out", "guidance_intervals", "precisions"):
            if getattr(self, name):
                raise ValueError(f"{name} needs data, the training set")
        if not self.timed:
            raise ValueError("timed must be True without data, the training set, got False")
        if len(self.guidance) > 1:
            raise ValueError(
                f"guidance must be one scale without data, the training set, got {self.guidance}"
            )

    def _check_variants(self) -> None:
        if unknown := [name for name in self.precisions if name not in PRECISIONS]:
            raise ValueError(
                f"precisions must be of {', '.join(PRECISIONS)}, got {', '.join(unknown)}"
            )
        for interval in self.guidance_intervals:
            Plan.parse("E1", guidance_interval=interval)
        for name in ("precisions", "guidance_intervals"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ, got {values}")

    @property
    def count(self) -> int:
        """Images per plan."""
        assert self.images is not None
        return self.images

    @property
    def steps(self) -> int:
        """Training steps of the classifier."""
        assert self.classifier_steps is not None
        return self.classifier_steps

    @property
    def fine_plan(self) -> Plan:
        """The plan of the fine solution."""
        return Plan.parse(str(self.reference_plan))

    def chosen(self, model: FlowModel | None) -> list[tuple[str, Plan | StagedPlan]]:
        """The plans to measure, by the texts that were given.

        model: None for the digits. Of the default, plans with the refiner only if it has one.
        ValueError for two plans that are the same, and for what is no plan of the model.
        """
        default = PLANS if model is None else CLASS_PLANS
        plans: list[tuple[str, Plan | StagedPlan]] = []
        for text in default if self.plans is None else self.plans:
            plan = Plan.parse(text) if model is None else model.find_plan(text)
            if same := [other for other, known in plans if known == plan]:
                raise ValueError(f"plans must differ, but {same[0]!r} and {text!r} are the same")
            if self.plans or model is None or model.refiner or not plan.cost.refiner:
                plans.append((text, plan))
        return plans
