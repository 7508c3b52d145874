"""The linear path of flow matching: x_t = t * data + (1 - t) * noise (paper section 3.1).

Its velocity is data - noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_path(data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The point x_t of the path, (N, ...).

    data, noise: (N, ...), of one dtype.
    t: a number or (N,), in [0, 1].
    """
    if isinstance(t, Tensor) and t.ndim == 1:
        t = t.view(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    return t * data + (1 - t) * noise


def path_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the path, dx_t/dt = data - noise, the same at every t."""
    return data - noise


def denoised(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The data that x reaches if its velocity stays as it is: x + (1 - t) * v.

    x: (N, ...). v: N rows, or 2N under guidance, of which the first N are read.
    """
    return x + (1 - t) * v[: len(x)].to(torch.promote_types(x.dtype, v.dtype))


def noise_estimate(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The noise that x comes from if its velocity was always v: x - t * v.

    With `denoised` it makes up x: x = t * denoised + (1 - t) * noise. Arguments as for `denoised`.
    """
    return x - t * v[: len(x)].to(torch.promote_types(x.dtype, v.dtype))
