"""The limits: bytes and floating-point operations that an operation can't do without, and what this device moves and multiplies."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from harness import seconds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowturbo.models.sit import SiTConfig
from flowturbo.plan import Plan
from flowturbo_kernels._op import tensors


class Work(NamedTuple):
    """bytes: every input read once, every output written once. flops: of matrix products, 2 a multiply-accumulate."""

    bytes: int
    flops: int


def work(name: str, args: tuple[Any, ...], results: Any) -> Work:
    """What the operation of that name must do on these arguments. A tensor given twice is read once."""
    distinct = {(t.data_ptr(), tuple(t.shape)): t for t in (*tensors(args), *tensors(results))}
    return Work(sum(t.numel() * t.element_size() for t in distinct.values()), _flops(name, args))


def _flops(name: str, args: tuple[Any, ...]) -> int:
    if name in ("linear", "linear_fp8", "linear_gated_residual"):
        x, weight = args[:2]
        return 2 * (x.numel() // x.shape[-1]) * weight.shape[0] * weight.shape[1]
    if name == "attention":
        B, T, _, heads, head_dim = args[0].shape
        return 4 * B * heads * T * T * head_dim
    if name == "patch_embed":
        x, weight, _, v = args[:4]
        pixels = (x if v is None else v)[:, 0].numel()
        return 2 * pixels * weight[0].numel() * weight.shape[0] // weight.shape[2] ** 2
    if name == "final_update":
        tokens, _, _, weight, _, x = args[:6]
        velocity_rows = tokens.shape[0] * x[0].numel()
        return 2 * velocity_rows * weight.shape[1]
    return 0


@functools.cache
def ceilings(device: str) -> dict[str, float]:
    """What a copy moves (bytes/s, read plus written) and what large products do (FLOP/s by dtype), measured now."""
    large = device == "cuda"
    source = torch.empty((1 << 30 if large else 1 << 25) // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)}
    size = 8192 if large else 1024
    for dtype in (torch.bfloat16, torch.float32) if large else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds(functools.partial(torch.mm, a, b), device)
    if large and torch.cuda.get_device_capability() >= (8, 9):
        a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        product = functools.partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        found["float8_e4m3fn"] = 2 * size**3 / seconds(product, device)
    return found


def floor(needed: Work, dtype: torch.dtype, device: str) -> float:
    """Seconds below which the operation can't come on this device: the larger of its two terms."""
    limits = ceilings(device)
    return max(needed.bytes / limits["copy"], needed.flops / limits.get(str(dtype).removeprefix("torch."), limits["float32"]))


def plan_floor(plan: Plan, predictor: SiTConfig, refiner: SiTConfig, batch: int, dtype: torch.dtype, device: str) -> float:
    """Seconds below which guided sampling of a batch can't come: every call's products, or its weights read once, whichever takes
    longer; adaLN's products once for all times, labels and the null class."""
    total = 0.0
    for config, refines in ((predictor, False), (refiner, True)):
        calls = [call for call in plan.calls if call.refiner == refines]
        rows = [batch * (2 if call.guided else 1) for call in calls]
        conditions = len({call.t for call in calls}) * (batch + 1)
        trunk, conditioning = config.trunk_macs(), config.conditioning_macs()
        block = config.depth * 12 * config.hidden**2 * dtype.itemsize
        total += sum(floor(Work(block, 2 * trunk * count), dtype, device) for count in rows)
        if calls:
            total += floor(Work(config.depth * 6 * config.hidden**2 * dtype.itemsize, 2 * conditioning * conditions), dtype, device)
    return total


def decode_floor(vae: nn.Module, latents: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    """Seconds below which decoding can't come: its products and convolutions at the rate of products."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(vae).to("meta").decode(torch.empty(latents, device="meta", dtype=dtype))
    return floor(Work(0, counter.get_total_flops()), dtype, device)
