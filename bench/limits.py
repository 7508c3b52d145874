"""The limit of each rival: seconds below which it can't sample a plan on this device."""

from __future__ import annotations

import roofline
import torch
from rivals import RIVALS
from subjects import Subject

import flowturbo as ft


def products_of(rival: str, s: Subject) -> torch.dtype:
    """The dtype in which a rival multiplies in the predictor's blocks. ValueError for a name that
    is none.
    """
    if rival not in RIVALS:
        raise ValueError(f"rival must be one of {', '.join(RIVALS)}, got {rival!r}")
    if rival.endswith("-fp8"):
        return torch.float8_e4m3fn
    return torch.bfloat16 if rival == "autocast" else s.dtype


def limit_of(rival: str, plan: str, s: Subject) -> float:
    """Seconds below which that rival can't sample the batch by the plan, decoding included where
    the subject is decoded.
    """
    dtype = torch.bfloat16 if rival == "autocast" else s.dtype
    configs = s.predictor.config, s.refiner.config
    limit = roofline.plan_floor(
        ft.Plan.parse(plan), *configs, s.batch, dtype, s.device.type, products_of(rival, s)
    )
    return limit + (
        roofline.decode_floor(s.vae, tuple(s.noise.shape), s.dtype, s.device.type)
        if s.decode
        else 0.0
    )
