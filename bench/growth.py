"""Cost as work grows: milliseconds an image over batch sizes, tokens, and numbers of H, P and R
steps, as JSON and plots.

    python bench/growth.py FOLDER

SiT-XL/2 with random weights on a GPU, a small model elsewhere, without decoding, guidance on.
growth.json is written anew after every point; the plots, of what there is, when all is measured or
the command is interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import collect
from lines import append
from machine import STAND_IN, device_name
from roofline import plan_floor
from subjects import depth

import flowturbo as ft
from flowturbo.evaluation.latency import measure
from flowturbo.models.random_weights import filled
from flowturbo.models.sit import SIT_CONFIGS, SiTConfig
from flowturbo.storage.files import write_text

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
PLAN = "H1P5R3"
SERIES = {
    # name: (on a GPU, elsewhere, what)
    "batches": ([8, 1, 2, 4, 16, 32, 64], [1, 2, 4], "batch sizes"),
    "counts": ([1, 2, 4, 8, 16], [1, 2, 4], "numbers of steps of a kind"),
    "sides": ([32, 64, 96, 128], [8, 16], "heights and widths of latents"),
}

Point = dict[str, Any]


def config(side: int) -> SiTConfig:
    if ON_CUDA:
        xl = SIT_CONFIGS["SiT-XL/2"]
        return replace(xl, side=side, depth=depth() or xl.depth)
    return SiTConfig(hidden=96, depth=2, heads=4, patch=2, side=side)


def model(side: int) -> ft.FlowModel:
    predictor = config(side)
    made = ft.load(
        filled(predictor, DEVICE, 0),
        filled(predictor.refiner(), DEVICE, 1),
        device=DEVICE,
        dtype=DTYPE,
    )
    made.captures.limit = 1
    return made


def point(m: ft.FlowModel, side: int, plan: str, batch: int, repeats: int) -> Point:
    timing = measure(m, plan, batch, 1.5, "latents", repeats=repeats)
    latents = ft.sample(m, plan, [0] * batch, guidance=1.5, seed=0, batch_size=batch)
    assert STAND_IN or latents.isfinite().all(), f"{plan} at batch {batch}: latents are not finite"
    m.captures.clear()
    predictor = config(side)
    limit = plan_floor(
        ft.Plan.parse(plan), predictor, predictor.refiner(), batch, DTYPE, DEVICE.type
    )
    return {
        "plan": plan,
        "batch": batch,
        "tokens": predictor.tokens,
        "ms_an_image": 1e3 * timing.seconds / batch,
        "limit_ms_an_image": 1e3 * limit / batch,
        "peak_bytes": timing.peak_bytes,
    }


def points(
    batches: list[int], counts: list[int], sides: list[int], repeats: int
) -> Iterator[tuple[str, float, Point]]:
    """(curve, abscissa, what was measured)."""
    for side in sides:
        m = model(side)
        if side == sides[0]:
            for batch in batches:
                yield "batch", batch, point(m, side, PLAN, batch, repeats)
            for letter, before in (("H", ""), ("P", "H1"), ("R", "H1")):
                for count in counts:
                    yield (
                        f"{letter} steps",
                        count,
                        point(m, side, f"{before}{letter}{count}", 8 if ON_CUDA else 1, repeats),
                    )
        yield "tokens", config(side).tokens, point(m, side, PLAN, 4 if ON_CUDA else 1, repeats)
        del m
        collect()


def plot(curves: dict[str, list[Point]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "images at a time": ["batch"],
        "tokens": ["tokens"],
        "steps of the kind": ["H steps", "P steps", "R steps"],
    }
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in (n for n in names if n in curves):
            at = [p["at"] for p in curves[name]]
            [line] = axis.plot(
                at,
                [p["ms_an_image"] for p in curves[name]],
                "o-",
                label=name if len(names) > 1 else PLAN,
            )
            axis.plot(
                at, [p["limit_ms_an_image"] for p in curves[name]], ":", color=line.get_color()
            )
            axis.set_xscale("log", base=2)
            axis.set_xticks(at, [str(a) for a in at])
            axis.legend(frameon=False)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
    axes[0].set_ylabel("ms an image (dotted: limit)")
    figure.suptitle(device_name(), fontsize="medium")
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for name, (cuda, cpu, what) in SERIES.items():
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=cuda if ON_CUDA else cpu, help=what
        )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each; their median counts"
    )
    arguments = vars(parser.parse_args())
    folder: Path = arguments.pop("folder")
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[Point]] = {}
    try:
        for curve, at, measured in points(**arguments):
            curves[curve] = sorted(
                [*curves.get(curve, []), {"at": at, **measured}], key=lambda p: p["at"]
            )
            ms, limit = measured["ms_an_image"], measured["limit_ms_an_image"]
            print(f"{curve} {at:g}: {ms:.2f} ms an image, limit {limit:.2f}", flush=True)
            assert math.isfinite(ms)
            append("growth", curve=curve, device=device_name(), point={"at": at, **measured})
            text = json.dumps(
                {"device": device_name(), "torch": torch.__version__, "curves": curves}, indent=1
            )
            write_text(folder / "growth.json", text + "\n")
    finally:
        try:
            plot(curves, folder / "growth.png")
        except ImportError as error:
            print(f"no plots: {error}")


if __name__ == "__main__":
    main()
