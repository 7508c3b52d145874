"""Cost as work grows: milliseconds an image over batch sizes, tokens, and numbers of H, P and R steps, as JSON and plots.

    python bench/growth.py FOLDER

SiT-XL/2 with random weights on a GPU, a small model elsewhere, without decoding, guidance on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from roofline import plan_floor

import flowturbo as ft
from flowturbo.files import write_text
from flowturbo.latency import filled, measure
from flowturbo.models.sit import SIT_CONFIGS, SiTConfig

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
BATCHES = (1, 2, 4, 8, 16, 32, 64) if ON_CUDA else (1, 2, 4)
SIDES = (32, 64, 96, 128) if ON_CUDA else (8, 16)
COUNTS = (1, 2, 4, 8, 16) if ON_CUDA else (1, 2, 4)
PLAN = "H1P5R3"


def config(side: int) -> SiTConfig:
    if ON_CUDA:
        return replace(SIT_CONFIGS["SiT-XL/2"], side=side)
    return SiTConfig(hidden=96, depth=2, heads=4, patch=2, side=side)


def model(side: int) -> ft.FlowModel:
    predictor = config(side)
    made = ft.load(filled(predictor, DEVICE, 0), filled(predictor.refiner(), DEVICE, 1), device=DEVICE, dtype=DTYPE)
    made.captures.limit = 1
    return made


def point(m: ft.FlowModel, side: int, plan: str, batch: int) -> dict[str, Any]:
    timing = measure(m, plan, batch, 1.5, "latents", repeats=5)
    m.captures.clear()
    predictor = config(side)
    limit = plan_floor(ft.Plan.parse(plan), predictor, predictor.refiner(), batch, DTYPE, DEVICE.type)
    return {
        "plan": plan,
        "batch": batch,
        "tokens": predictor.tokens,
        "ms_an_image": 1e3 * timing.seconds / batch,
        "limit_ms_an_image": 1e3 * limit / batch,
        "peak_bytes": timing.peak_bytes,
    }


def points() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(curve, abscissa, what was measured)."""
    for side in SIDES:
        m = model(side)
        if side == SIDES[0]:
            for batch in BATCHES:
                yield "batch", batch, point(m, side, PLAN, batch)
            for letter, before in (("H", ""), ("P", "H1"), ("R", "H1")):
                for count in COUNTS:
                    yield f"{letter} steps", count, point(m, side, f"{before}{letter}{count}", 8 if ON_CUDA else 1)
        batch = 4 if ON_CUDA else 1
        yield "tokens", config(side).tokens, point(m, side, PLAN, batch)
        del m
        gc.collect()


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "images at a time": ["batch"],
        "tokens": ["tokens"],
        "steps of the kind": ["H steps", "P steps", "R steps"],
    }
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            at = [p["at"] for p in curves[name]]
            [line] = axis.plot(at, [p["ms_an_image"] for p in curves[name]], "o-", label=name if len(names) > 1 else PLAN)
            axis.plot(at, [p["limit_ms_an_image"] for p in curves[name]], ":", color=line.get_color())
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(a) for a in at])
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.legend(frameon=False)
    axes[0].set_ylabel("ms an image (dotted: limit)")
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[dict[str, Any]]] = {}
    for curve, at, measured in points():
        curves.setdefault(curve, []).append({"at": at, **measured})
        print(f"{curve} {at:g}: {measured['ms_an_image']:.2f} ms an image, limit {measured['limit_ms_an_image']:.2f}", flush=True)
        assert math.isfinite(measured["ms_an_image"])
    device = torch.cuda.get_device_name() if ON_CUDA else "cpu"
    write_text(
        folder / "growth.json", json.dumps({"device": device, "torch": torch.__version__, "curves": curves}, indent=1) + "\n"
    )
    plot(curves, folder / "growth.png")


if __name__ == "__main__":
    main()
