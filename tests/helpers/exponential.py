"""The steps U, D, X, E, A and H written out independently, in denoised states and in float64, and
diffusers' own schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
FLOW: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


def scheduler_of(letter: str, shift: float = 1.0, **options: Any) -> Any:
    """diffusers' scheduler whose method is U's or D's."""
    import diffusers

    kinds = {"U": diffusers.UniPCMultistepScheduler, "D": diffusers.DPMSolverMultistepScheduler}
    return kinds[letter](**FLOW, flow_shift=shift, solver_order=2, **options)


def by_diffusers(scheduler: Any, v: Velocity, x: Tensor) -> Tensor:
    """A pipeline's loop. v: our velocity; a model of diffusers returns minus it."""
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(-v(x, 1 - sigma), timestep, x, return_dict=False)[0]
    return x


def dpm_without_rounding(scheduler: Any, v: Velocity, x: Tensor) -> Tensor:
    """`by_diffusers` by DPM-Solver++'s own updates; its `step` would round x to float32."""
    sigmas, denoised = scheduler.sigmas.tolist(), list[Tensor]()
    for i, sigma in enumerate(sigmas[:-1]):
        scheduler._step_index = i
        denoised.append(x + sigma * v(x, 1 - sigma))
        if i == 0 or i == len(sigmas) - 2:
            x = scheduler.dpm_solver_first_order_update(denoised[-1], sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update(denoised[-2:], sample=x)
    return x


def log_snr(t: float) -> float:
    t = max(t, 1e-6)
    return math.log(t / (1 - t))


def res_2s(v: Velocity, x: Tensor, t0: float, t1: float) -> Tensor:
    """An exponential Runge-Kutta step of order 2 for dx/dl = D - x, l = -log(noise level)."""
    s0, s1 = 1 - t0, 1 - t1
    d0 = x + s0 * v(x, t0)
    if s1 == 0:
        return d0
    h, c2 = math.log(s0) - math.log(s1), 0.5

    def phi1(z: float) -> float:
        return (math.exp(z) - 1) / z

    def phi2(z: float) -> float:
        return (math.exp(z) - 1 - z) / z**2

    stage = math.exp(-c2 * h) * x + c2 * h * phi1(-c2 * h) * d0
    s = s0 * math.exp(-c2 * h)
    d1 = stage + s * v(stage, 1 - s)
    b1, b2 = phi1(-h) - phi2(-h) / c2, phi2(-h) / c2
    return math.exp(-h) * x + h * (b1 * d0 + b2 * d1)


def written_out(letters: str, times: Sequence[float], v: Velocity, x: Tensor) -> Tensor:
    """Any mixture of the six kinds of step, the velocity's first rows moving x."""
    rows, points = len(x), list[tuple[float, Tensor, Tensor]]()  # time, denoised state, velocity
    corrected, predictor = x, 0  # before the last U step, and its order

    def moved(x: Tensor, t0: float, t1: float, d0: Tensor, difference: Tensor | float) -> Tensor:
        share = (t1 - t0) / (1 - t0)  # 1 - exp(-h) in terms of alpha = t1
        return (1 - share) * x + share * (d0 + difference)

    for letter, t0, t1 in zip(letters, times, times[1:], strict=False):
        v0 = v(x, t0)
        d0 = x + (1 - t0) * v0[:rows]
        order = 2 if points and t1 < 1 else 1
        if letter == "U" and predictor:
            # UniC: again from the corrected state before, now knowing D at the end, too.
            (t_before, d_before, _), h = points[-1], log_snr(t0) - log_snr(points[-1][0])
            if predictor == 1:
                difference = (d0 - d_before) / 2
            else:
                r = (log_snr(points[-2][0]) - log_snr(t_before)) / h
                phi = [math.expm1(-h) / -h]
                phi += [(phi[0] - 1) / -h]
                phi += [(phi[1] - 0.5) / -h]
                matrix = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
                sides = torch.tensor([phi[1], 2 * phi[2]], dtype=torch.float64) / phi[0]
                a, b = torch.linalg.solve(matrix, sides).tolist()
                difference = a * (points[-2][1] - d_before) / r + b * (d0 - d_before)
            x = moved(corrected, t_before, t0, d_before, difference)
        corrected = x
        if letter in "UD":
            difference = 0.0
            if order == 2:
                ratio = (log_snr(t1) - log_snr(t0)) / (log_snr(t0) - log_snr(points[-1][0]))
                difference = ratio * (d0 - points[-1][1]) / 2
            x = moved(x, t0, t1, d0, difference)
        elif letter == "X":
            x = res_2s(lambda x, t: v(x, t)[:rows], x, t0, t1)
        elif letter == "H":
            v1 = v(x + (t1 - t0) * v0[:rows], t1)
            x = x + (t1 - t0) / 2 * (v0 + v1)[:rows]
        elif letter == "A" and points:
            share = (t1 - t0) / (2 * (t0 - points[-1][0]))
            x = x + (t1 - t0) * ((1 + share) * v0 - share * points[-1][2])[:rows]
        else:
            x = x + (t1 - t0) * v0[:rows]
        points.append((t0, d0, v0))
        predictor = order if letter == "U" else 0
    return x
