"""Whether what is timed is right: everyone's latents and images against plain eager torch's, and an
operation's results against its reference's. No time of a wrong result counts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from limits import products_of
from rivals import OWN_WEIGHTS, reference
from sampling import Sampler
from subjects import subject
from torch import Tensor

from flowturbo_kernels.arguments import tensors

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.04, torch.float8_e4m3fn: 0.1}
"""How far latents may be apart, of what the plan has changed in the noise, by the dtype of the
products. On a CPU SiT-XL/2 (64 tokens, H1P5R3) in bfloat16 was 1.2 % from float32, and in fp8 4.8 %
from bfloat16; with one MLP of its 28 that gives nought it was 13 % off.
"""
IMAGES = 2.5
"""How much further apart images may be, of how they differ from their mean: of latents that are 1 %
apart the decoder made images that are 2.4 % apart.
"""

RESULTS = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float8_e4m3fn: 0.08}
"""The same for an operation's results, of their own size."""


@functools.cache
def expected(size: int, batch: int, decode: bool, plan: str) -> tuple[Tensor, Tensor | None]:
    """Plain eager torch's latents and, if decoded, images, on the CPU, where no peak counts
    them.
    """
    sampler = reference(subject(size, batch, decode))
    return sampler.latents(plan).cpu(), sampler(plan).cpu() if decode else None


def differences(rival: str, sampler: Sampler, plan: str) -> tuple[dict[str, float], str | None]:
    """How far the latents and images of a rival are from plain eager torch's -> ("latents" and
    "images" by name, what is wrong with them or None). The images come last: what gives them, such
    as a graph of the plan, is what will be timed.
    """
    s = sampler.subject
    latents = sampler.latents(plan)
    result = sampler(plan) if s.decode else None
    if not latents.isfinite().all():
        return {}, "latents are not finite"
    if rival in OWN_WEIGHTS:
        return {}, None
    size = 8 * s.noise.shape[-1]  # the decoder's factor
    expected_latents, images = expected(size, s.batch, s.decode, plan)
    found = {"latents": distance(latents, expected_latents, s.noise)}
    if result is not None and images is not None:
        found["images"] = distance(result, images, images.double().mean())
    bound = BOUNDS[products_of(rival, s)]
    for what, most in (("latents", bound), ("images", IMAGES * bound)):
        if not found.get(what, 0.0) <= most:
            return found, (
                f"{what} are {found[what]:.1%} from plain eager torch's, expected {most:.1%}"
            )
    return found, None


def distance(actual: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    """|actual - expected| / |expected - origin|; infinite where either is not finite."""
    a, e = actual.double().cpu(), expected.double().cpu()
    if not (a.isfinite().all() and e.isfinite().all()):
        return float("inf")
    size = e - (origin.double().cpu() if isinstance(origin, Tensor) else origin)
    return float((a - e).norm() / size.norm().clamp(min=torch.finfo(torch.float64).tiny))


def result_difference(results: Any, expected: Any) -> float:
    """The largest distance of an operation's results from its reference's."""
    pairs = zip(tensors(results), tensors(expected), strict=True)
    return max(distance(got.float(), wanted.float()) for got, wanted in pairs)
