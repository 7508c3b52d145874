"""Evaluations of a small random model."""

import json
from dataclasses import replace
from pathlib import Path

from tiny import CONFIG

import flowturbo as ft
import flowturbo.evaluation.quality as module
from flowturbo.evaluation.quality import Evaluate

DIGITS = replace(CONFIG, hidden=16, depth=3, heads=2, channels=1)
PLANS_HERE = ("H1R1", "E2", "H20")
NAMES = {"quality.json", "quality.md", "quality.png", "fine.safetensors"}


def settings(models, out: Path, **changes) -> Evaluate:
    few = dict(
        images=25, batch_size=10, reference_images=21, reference_plan="H20", classifier_steps=10
    )
    defaults = dict(
        plans=PLANS_HERE, device="cpu", out=out, model=str(models[0]), refiner=str(models[1])
    )
    return Evaluate(**{**few, **defaults, **changes})


def read(out: Path) -> dict:
    return json.loads((out / "quality.json").read_text(encoding="utf-8"))


class Killed(BaseException):
    """Like a kill, caught by nobody."""


def kill_at(monkeypatch, victim: str) -> list[str]:
    """From now on sampling with the plan `victim` is the end, in its second batch; -> the plans
    sampled so far, a batch each.
    """
    seen: list[str] = []

    def sample(model, plan, *rest, **others):
        seen.append(str(plan))
        if str(plan) == victim and seen.count(victim) == 2:
            raise Killed
        return ft.sample(model, plan, *rest, **others)

    monkeypatch.setattr(module, "sample", sample)
    return seen
