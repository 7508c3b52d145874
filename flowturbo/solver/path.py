"""The linear path of flow matching: x_t = t * data + (1 - t) * noise, whose velocity is data -
noise (paper section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_path(data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """data, noise (N, ...); t a number or (N,), in [0, 1] -> x_t (N, ...)."""
    if isinstance(t, Tensor) and t.ndim == 1:
        t = t.view(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    return t * data + (1 - t) * noise


def path_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The path's velocity dx_t/dt = data - noise, the same at every t."""
    return data - noise


def denoised(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The data that x would reach if its present velocity stayed: x + (1 - t) * v, by the first
    len(x) rows of v.
    """
    return x + (1 - t) * v[: len(x)].to(torch.promote_types(x.dtype, v.dtype))
