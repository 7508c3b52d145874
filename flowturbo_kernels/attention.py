"""Self-attention over packed q, k and v."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ._op import Make, expect_floating, expect_shape, op


def _check(qkv: Tensor) -> None:
    expect_shape("attention", "qkv", qkv, (None, None, 3, None, None))
    expect_floating("attention", qkv=qkv)


def _example(make: Make) -> Iterable[tuple[Tensor, ...]]:
    for B, T, heads, head_dim in ((1, 1, 1, 8), (2, 16, 4, 24), (2, 7, 1, 72), (1, 256, 16, 72)):
        yield (make(B, T, 3, heads, head_dim),)


@op(check=_check, example=_example, schema="(Tensor qkv) -> Tensor")
def attention(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v, without a mask.

    qkv (B, T, 3, heads, head_dim), as a qkv projection leaves it -> (B, T, heads * head_dim). head_dim need not be a power of two.
    """
    B, T, _, heads, head_dim = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(B, T, heads * head_dim)
