"""Programmatic dependent launch: where it is used, in Triton's kernels and in csrc's."""

from __future__ import annotations

import functools
import os

import torch


def dependent_launch() -> bool:
    """Whether kernels are launched so on the current device: from sm_90 on.

    The variable FLOWTURBO_PDL=0 turns it off, to measure what it gains.
    """
    return os.environ.get("FLOWTURBO_PDL") != "0" and _on(torch.cuda.current_device())


@functools.cache
def _on(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and not torch.version.hip
