"""How Hopper's tensor cores sum products of fp8, and what error that allows."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_SUMS = 1.2e-3
"""By how much a product of K = 1152 normally distributed numbers in e4m3 may err by its sums alone.

Triton's tl.dot leaves the whole sum over K to the tensor cores on sm_90, whatever the depth of a
tile (max_num_imprecise_acc is 2^30 by default), and so does torch's scaled product with
use_fast_accum: nothing is promoted to float32 on the way. There 32 products and the sum so far are
aligned to the largest of them, and cut off below 13 bits of its mantissa (SageAttention2, arXiv
2411.10958; Khattak and Mikaitis, arXiv 2512.07004; DeepSeek-V3, arXiv 2412.19437, counts the
leading bit and says 14; pytorch/pytorch#147971 calls it fp22). `product` does the same and errs by
6e-4 (tests/kernels/test_fp8.py); twice that is allowed. One bit less would err by 1.4e-3. Promoted
to float32 after every 128, as without use_fast_accum, it would err by 1.3e-4.
"""


def product(x: Tensor, weight: Tensor, bits: int = 13, promote: int | None = None) -> Tensor:
    """x (M, K), weight (N, K), in e4m3, K a multiple of 32 -> (M, N) in float64, summed as Hopper's
    tensor cores do.

    promote: after so many of K the sum so far goes to a second one, which is exact here.
    """
    a, b = x.double(), weight.double()
    total, done = (torch.zeros(len(x), len(weight), dtype=torch.float64) for _ in range(2))
    for start in range(0, x.shape[1], 32):
        products = a[:, None, start : start + 32] * b[None, :, start : start + 32]
        total = _aligned(torch.cat([products, total[..., None]], dim=2), bits).sum(2)
        if promote and (start + 32) % promote == 0:
            done, total = done + total, torch.zeros_like(total)
    return done + _aligned(total[..., None], bits)[..., 0]


def _aligned(terms: Tensor, bits: int) -> Tensor:
    """All terms (..., n) cut off, towards zero, below so many bits of the largest one's
    mantissa.
    """
    _, exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))  # of a mantissa from 1/2 to 1
    step = torch.ldexp(torch.ones_like(terms[..., :1]), exponent - 1 - bits)
    return (terms / step).trunc() * step
