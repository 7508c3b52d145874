"""The limits: bytes and floating-point operations that an operation can't do without, and what this
device moves and multiplies.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple, cast

import torch
from decoder import Upsampler
from harness import seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowturbo.models.sit import SiTConfig
from flowturbo.solver.plan import Plan
from flowturbo_kernels.arguments import tensors


class Work(NamedTuple):
    """bytes: every input read once, every output written once. flops: of matrix products, 2 a
    multiply-accumulate.
    """

    bytes: int
    flops: int


def work(name: str, args: tuple[Any, ...], results: Any) -> Work:
    """What the operation of that name must do on these arguments. A tensor given twice is read
    once.
    """
    if name == "attention_branch_fp8":  # which reads one of its two weights
        args = args[:5] + args[6:]
    distinct = {(t.data_ptr(), tuple(t.shape)): t for t in (*tensors(args), *tensors(results))}
    return Work(sum(t.numel() * t.element_size() for t in distinct.values()), _flops(name, args))


WEIGHTS = {
    "linear": 1, "linear_fp8": 1, "linear_gated_residual": 1, "branch_end_fp8": 1,
    "linear_quantized": 2, "linear_quantized_residual": 2,
}  # fmt: skip
"""Of products of rows with a weight: which argument that is."""


def _flops(name: str, args: tuple[Any, ...]) -> int:
    if name in WEIGHTS:
        x, weight = args[0], args[WEIGHTS[name]]
        return 2 * (x.numel() // x.shape[-1]) * weight.shape[0] * weight.shape[1]
    if name.startswith("attention"):
        B, T, _, heads, head_dim = args[0].shape
        product = B * T * args[2].numel() if name == "attention_branch_fp8" else 0
        return 4 * B * heads * T * T * head_dim + 2 * product
    if name == "patch_embed":
        x, weight, _, v = args[:4]
        pixels = (x if v is None else v)[:, 0].numel()  # the same tokens twice are made once
        return 2 * pixels * weight[0].numel() * weight.shape[0] // weight.shape[2] ** 2
    if name == "conditions":
        times, weight1, weight2 = args[1], args[2], args[4]
        return 2 * len(times) * (weight1.numel() + weight2.numel())
    if name == "final_update":
        tokens, _, _, weight, _, x = args[:6]
        velocity_rows = tokens.shape[0] * x[0].numel()
        return 2 * velocity_rows * weight.shape[1]
    return 0


@functools.cache
def ceilings(device: str) -> dict[str, float]:
    """What a copy moves (bytes/s, read plus written) and what large products do (FLOP/s by dtype),
    measured now.
    """
    large = device == "cuda"
    source = torch.empty((1 << 30 if large else 1 << 25) // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)}
    size = 8192 if large else 1024
    for dtype in (torch.bfloat16, torch.float32) if large else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = (
            2 * size**3 / seconds(functools.partial(torch.mm, a, b), device)
        )
    if large and torch.cuda.get_device_capability() >= (8, 9):
        a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        product = functools.partial(
            torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        found["float8_e4m3fn"] = 2 * size**3 / seconds(product, device)
    return found


def floor(needed: Work, dtype: torch.dtype, device: str) -> float:
    """Seconds below which the operation can't come on this device: the larger of its two terms."""
    return max(needed.bytes / ceilings(device)["copy"], needed.flops / _rate(dtype, device))


def _rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of products in that dtype; float32's where it was not measured."""
    limits = ceilings(device)
    return limits.get(str(dtype).removeprefix("torch."), limits["float32"])


LIMIT = (
    "The ceilings are those of large products, whose clocks the power limit holds back (790 "
    "TFLOP/s in bfloat16 is such a "
    "ceiling). At batch 1 less power is drawn: boost clocks may be higher, and a run may come "
    "below its limit."
)
"""What to say beside a limit."""


def plan_floor(
    plan: Plan,
    predictor: SiTConfig,
    refiner: SiTConfig,
    batch: int,
    dtype: torch.dtype,
    device: str,
    products: torch.dtype | None = None,
) -> float:
    """Seconds below which guided sampling of a batch can't come: every call's products, or its
    weights read once, whichever takes longer; adaLN's products once for all times, labels and the
    null class.

    products: the dtype of the four products of the predictor's blocks, where it is not dtype, as in
    fp8. Attention, the ends, adaLN and the refiner are in dtype whatever that is. See LIMIT for
    what these seconds are worth.
    """
    total = 0.0
    for config, refines in ((predictor, False), (refiner, True)):
        calls = [call for call in plan.calls if call.refiner == refines]
        conditions = len({call.t for call in calls}) * (batch + 1)
        kind = dtype if refines or products is None else products
        total += sum(
            _call_floor(config, batch * (2 if call.guided else 1), dtype, kind, device)
            for call in calls
        )
        if calls:
            weights = config.depth * 6 * config.hidden**2 * dtype.itemsize
            total += floor(
                Work(weights, 2 * config.conditioning_macs() * conditions), dtype, device
            )
    return total


def _call_floor(
    config: SiTConfig, rows: int, dtype: torch.dtype, products: torch.dtype, device: str
) -> float:
    """Of one call of a network on that many rows, adaLN's products apart."""
    weights = config.depth * 12 * config.hidden**2
    macs = weights * config.tokens
    multiplying = (
        2
        * rows
        * (macs / _rate(products, device) + (config.trunk_macs() - macs) / _rate(dtype, device))
    )
    return max(weights * products.itemsize / ceilings(device)["copy"], multiplying)


def decode_flops(vae: nn.Module, latents: tuple[int, ...], doubled: bool = True) -> int:
    """Floating-point operations of decoding latents (N, C, H, W): of its products and convolutions.

    doubled: count a 3x3 convolution of a nearest-neighbour doubling as the four 2x2 convolutions of
    the small image that give the same, 4 taps a pixel instead of 9. False: as it is written.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in vae.parameters()
    }
    vae = copy.deepcopy(vae, memo)  # none of its memory
    spared = 0

    def after_doubling(module: nn.Module, _: Any, y: Tensor) -> None:
        nonlocal spared
        weight = cast(Tensor, module.weight)
        spared += 2 * (9 - 4) * weight.shape[0] * weight.shape[1] * y[:, 0].numel()

    for module in vae.modules():
        if isinstance(module, Upsampler):
            module.conv.register_forward_hook(after_doubling)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dtype = next(vae.parameters()).dtype
        vae.decode(torch.empty(latents, device="meta", dtype=dtype))
    return counter.get_total_flops() - (spared if doubled else 0)


def decode_floor(
    vae: nn.Module, latents: tuple[int, ...], dtype: torch.dtype, device: str
) -> float:
    """Seconds below which decoding can't come: its products and convolutions, the cheapest way, at
    the rate of products.
    """
    return floor(Work(0, decode_flops(vae, latents)), dtype, device)
