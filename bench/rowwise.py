"""Products in fp8 as torch's users have them: torchao's where it is installed, else the same in
plain torch. The rivals' layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import torch
from plain_sit import PlainSiT
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_TINY = 1e-12


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> e4m3 (M, K) and float32 (M, 1), whose product is about the same: every row's
    largest magnitude becomes 448.
    """
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=_TINY)
    return (rows.float() / scale).to(E4M3), scale


class RowwiseLinear(nn.Module):
    """A linear layer with an e4m3 weight, one scale an output, whose input is quantised row by row
    in the call. bfloat16 out.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantised(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.t().contiguous())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        q, scale = _quantised(x.flatten(0, -2))
        y = torch._scaled_mm(
            q,
            self.weight.t(),
            scale,
            self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], -1)


def _products(network: PlainSiT) -> Iterator[tuple[nn.Module, str]]:
    """The four of every block, as (module, name in it)."""
    for block in network.blocks:
        for part in block.attn, block.mlp:
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    yield part, name


def quantise(network: PlainSiT) -> str:
    """Put the products of the blocks into fp8, in place -> by whom."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        for part, name in _products(network):
            setattr(part, name, RowwiseLinear(getattr(part, name)))
        return "row-wise fp8 by torch._scaled_mm"
    wanted = {id(getattr(part, name)) for part, name in _products(network)}
    quantize_(
        network,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        lambda layer, _: id(layer) in wanted,
    )
    return f"row-wise fp8 by torchao {version('torchao')}"
