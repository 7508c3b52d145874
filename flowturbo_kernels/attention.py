"""Self-attention over packed q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _flash_attention
from ._e4m3 import saturated
from ._op import op, requested_backend
from ._triton import dot_precision, in_turn, kernel, next_power_of_2, tl, too_large
from ._tune import Candidates, form
from .arguments import Make, expect_floating, expect_shape
from .batch_invariant import multiplied

# Triton: one program per block of queries of one head; an online softmax over blocks of keys, which
# are read in place from the packed qkv. head_dim is a constexpr, so that the compiler knows loads
# are aligned, and is split in two: 72 = 64 + 16, with half of the second masked, where one power of
# two would multiply 128 wide.


@kernel
def _attention_kernel(
    qkv, out_scale, out, T, qkv_b, qkv_t, scale, HEADS: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # All in axis 0: the others end at 65535, which batch times heads may exceed.
    in_turn(PDL)
    blocks = tl.cdiv(T, BLOCK_M)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = head // HEADS, head % HEADS
    q_ptr = qkv + b.to(tl.int64) * qkv_b + h * D
    k_ptr, v_ptr = q_ptr + HEADS * D, q_ptr + 2 * HEADS * D
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL > 0 else 1)
    rows = (m < T)[:, None]
    q = tl.load(q_ptr + m[:, None] * qkv_t + d[None, :], mask=rows & (d < D)[None, :], other=0.0)
    if TAIL > 0:
        q_tail = tl.load(
            q_ptr + m[:, None] * qkv_t + e[None, :], mask=rows & (e < D)[None, :], other=0.0
        )
        y_tail = tl.zeros((BLOCK_M, TAIL), dtype=tl.float32)
    y = tl.zeros((BLOCK_M, MAIN), dtype=tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, T, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < T)[:, None]
        k = tl.load(
            k_ptr + n[:, None] * qkv_t + d[None, :], mask=inside & (d < D)[None, :], other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL > 0:
            k_tail = tl.load(
                k_ptr + n[:, None] * qkv_t + e[None, :], mask=inside & (e < D)[None, :], other=0.0
            )
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        # scale includes log2(e): the softmax is of powers of two
        s = tl.where((n < T)[None, :], s * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, axis=1)
        largest = larger
        p = p.to(q.dtype)
        v = tl.load(
            v_ptr + n[:, None] * qkv_t + d[None, :], mask=inside & (d < D)[None, :], other=0.0
        )
        y = tl.dot(p, v, y * shrink[:, None], input_precision=PRECISION)
        if TAIL > 0:
            v_tail = tl.load(
                v_ptr + n[:, None] * qkv_t + e[None, :], mask=inside & (e < D)[None, :], other=0.0
            )
            y_tail = tl.dot(p, v_tail, y_tail * shrink[:, None], input_precision=PRECISION)
    out += (b.to(tl.int64) * T + m[:, None]) * (HEADS * D) + h * D
    y = y / total[:, None]
    if QUANTIZED:
        y = saturated(y, out_scale)
    tl.store(out + d[None, :], y, mask=rows & (d < D)[None, :])
    if TAIL > 0:
        y_tail = y_tail / total[:, None]
        if QUANTIZED:
            y_tail = saturated(y_tail, out_scale)
        tl.store(out + e[None, :], y_tail, mask=rows & (e < D)[None, :])


TILES: tuple[tuple[int, int, int, int], ...] = (
    (128, 128, 8, 2),
    (128, 64, 8, 3),
    (64, 64, 4, 3),
    (64, 32, 4, 3),
)
"""(queries, keys, warps, stages) of a program: `auto`'s candidates, the default first."""
EXACT_TILES: tuple[tuple[int, int, int, int], ...] = ((16, 32, 4, 1),)
"""For float32, which does not use the tensor cores."""


def _head_pieces(head_dim: int) -> tuple[int, int]:
    """Powers of two, at least 16 as a matrix product needs them, that hold head_dim; the second is
    0 where one does.
    """
    main = max(16, next_power_of_2(head_dim + 1) // 2)
    rest = head_dim - main
    return main, max(16, next_power_of_2(rest)) if rest > 0 else 0


def _check(qkv: Tensor) -> None:
    expect_shape("attention", "qkv", qkv, (None, None, 3, None, None))
    expect_floating("attention", qkv=qkv)


def _example(make: Make) -> Iterable[tuple[Tensor, ...]]:
    for B, T, heads, head_dim in ((1, 1, 1, 8), (2, 16, 4, 24), (2, 7, 1, 72), (1, 70, 2, 72)):
        yield (make(B, T, 3, heads, head_dim),)


def _trains_on_cpu(qkv: Tensor) -> bool:
    """Whether a gradient will be wanted of bfloat16 on the CPU: there torch's own attention takes
    two to four times as long, forward and backward, as products of few tokens.
    """
    short = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[1] <= 512
    return short and qkv.requires_grad and torch.is_grad_enabled()


@op(check=_check, example=_example, schema="(Tensor qkv) -> Tensor")
def attention(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v, without a mask.

    qkv (B, T, 3, heads, head_dim), as a qkv projection leaves it -> (B, T, heads * head_dim).
    head_dim need not be a power of two.
    """
    B, T, _, heads, head_dim = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if _trains_on_cpu(qkv):
        out = ((q * head_dim**-0.5) @ k.mT).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(B, T, heads * head_dim)


@attention.cpu_bfloat16
def _attention_cpu(qkv: Tensor) -> Tensor:
    return multiplied(attention.reference, qkv)


def _unsupported(qkv: Tensor) -> str | None:
    T, head_dim = qkv.shape[1], qkv.shape[-1]
    if head_dim % 8 or head_dim > 128:
        return f"head_dim must be a multiple of 8 up to 128, got {head_dim}"
    return too_large(T * max(qkv.stride(1), qkv[:1, :1].numel()))


def _candidates(qkv: Tensor) -> Candidates:
    """Our tiles and, under "auto", torch's backends and FlashAttention-4. Nothing is cold: in a
    plan, too, the projection before has just written qkv, and what fits of it is in the cache.
    """
    tiles = EXACT_TILES if qkv.dtype == torch.float32 else TILES
    functions: dict[str, Callable[..., Tensor]] = {
        f"triton {tile}": partial(run_tile, qkv, tile) for tile in tiles
    }
    if requested_backend() == "auto":
        functions |= _flash_attention.candidates(qkv, attention.reference)
    return Candidates(("attention", form(qkv)), functions, qkv.device)


@attention.backend("triton", unsupported=_unsupported, candidates=_candidates)
def _attention_triton(qkv: Tensor) -> Tensor:
    y: Tensor = _candidates(qkv).run()
    return y


def run_tile(
    qkv: Tensor, tile: tuple[int, int, int, int], out_scale: Tensor | None = None
) -> Tensor:
    """The kernel with one tile (queries, keys, warps, stages), cut down for few tokens.

    out_scale, float32 (1,): the result is e4m3, and stands for itself times the scale.
    """
    B, T, _, heads, head_dim = qkv.shape
    if qkv.stride()[2:] != (heads * head_dim, head_dim, 1):
        qkv = qkv.contiguous()
    most = max(16, next_power_of_2(T))
    queries, keys, warps, stages = min(tile[0], most), min(tile[1], most), *tile[2:]
    quantized = out_scale is not None
    dtype = torch.float8_e4m3fn if quantized else qkv.dtype
    out = torch.empty(B, T, heads * head_dim, dtype=dtype, device=qkv.device)
    scale = 1.4426950408889634 / head_dim**0.5
    _attention_kernel.launch(
        (-(-T // queries) * B * heads,), qkv, qkv if out_scale is None else out_scale, out, T,
        *qkv.stride()[:2], scale, heads, head_dim, *_head_pieces(head_dim), quantized,
        dot_precision(qkv), queries, keys,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
