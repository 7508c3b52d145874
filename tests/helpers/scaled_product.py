"""A product in fp8 with a scale a row and a column, where torch on the CPU has none."""

from __future__ import annotations

import torch


def scaled_product_by_rows(q, weight, scale, weight_scale, bias, out_dtype, use_fast_accum):
    """As torch._scaled_mm is on a GPU; on the CPU older ones have one scale only."""
    assert q.dtype == weight.dtype == torch.float8_e4m3fn
    assert (scale.shape, weight_scale.shape) == ((len(q), 1), (1, weight.shape[1]))
    assert scale.dtype == weight_scale.dtype == torch.float32
    assert scale.is_contiguous()
    assert weight_scale.is_contiguous()
    assert bias.dtype == out_dtype
    return ((q.float() @ weight.float()) * scale * weight_scale + bias.float()).to(out_dtype)
