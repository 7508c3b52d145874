"""The rivals in fp8 quantise as this library does, row by row."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from close import assert_close
from paths import ROOT
from scaled_product import scaled_product_by_rows
from tiny import CONFIG, random_sit
from torch import nn

from flowturbo_kernels import quantize_rows

sys.path.insert(0, str(ROOT / "bench"))

import rivals
import rowwise
import subjects
from plain_sit import FusedMLP, HoistedSiT, PlainSiT


def test_plain_fp8_has_a_scale_a_row_as_ours_has():
    rows = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 3.0])[:, None]
    for given in (rows, rows.bfloat16()):
        (q, scale), (expected, scales) = rowwise._quantised(given), quantize_rows(given)
        assert q.view(torch.uint8).equal(expected.view(torch.uint8))
        assert scale.equal(scales[:, None])


def test_plain_fp8_errs_as_ours_does(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product_by_rows)
    monkeypatch.setitem(sys.modules, "torchao", None)
    config = replace(CONFIG, hidden=96, heads=4)
    sit = random_sit(config, 5).bfloat16()
    plain = PlainSiT.of(sit)
    x, t, y = torch.randn(3, 4, 8, 8).bfloat16(), torch.rand(3), torch.tensor([0, 1, 2])
    exact = plain(x, t, y).float()
    assert rowwise.quantise(plain) == "row-wise fp8 by torch._scaled_mm"
    assert (
        len([m for m in plain.modules() if isinstance(m, rowwise.RowwiseLinear)])
        == 4 * config.depth
    )
    error = (plain(x, t, y).float() - exact).norm() / exact.norm()
    ours = (sit.quantize_()(x, t, y).float() - exact).norm() / exact.norm()
    assert 0 < error < 1.5 * ours
    fused = HoistedSiT(plain)
    assert_close(fused(x, t, y).float(), plain(x, t, y).float(), 0.02)


def test_torchaos_layers_are_taken_where_it_is(monkeypatch):
    """All four products of each block, and no other."""
    taken = []
    quantization = ModuleType("torchao.quantization")

    def quantize_(network, config, filter_fn):
        taken.extend(name for name, layer in network.named_modules() if filter_fn(layer, name))
        assert config == ("rows",)

    quantization.quantize_ = quantize_
    quantization.PerRow = lambda: "rows"
    quantization.Float8DynamicActivationFloat8WeightConfig = lambda granularity: (granularity,)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    monkeypatch.setattr(rowwise, "version", lambda name: "9.9")
    assert rowwise.quantise(PlainSiT.of(random_sit(CONFIG, 0))) == "row-wise fp8 by torchao 9.9"
    assert taken == [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


def test_no_quantised_product_does_the_gelu():
    """torchao's layers are still nn.Linear: what their weights are tells."""

    class Quantised(torch.Tensor):
        pass

    layers = [nn.Linear(8, 32), nn.Linear(8, 32)]
    layers[1].weight = nn.Parameter(
        layers[1].weight.detach().as_subclass(Quantised), requires_grad=False
    )
    assert isinstance(layers[1].weight, Quantised)
    fused = [
        FusedMLP(layer, nn.Linear(32, 8)).fused
        for layer in (*layers, rowwise.RowwiseLinear(layers[0]))
    ]
    assert fused == [True, False, False]


@pytest.mark.parametrize("rival", ["ours-fp8", "max-autotune-fp8", "plan-graph-fp8"])
def test_fp8_is_refused_below_sm_89(rival, monkeypatch):
    s = subjects.subject(64, 1, False)
    s = replace(s, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(
        rivals.Unavailable, match="need a GPU of sm_89 or later, and this one is sm_80"
    ):
        rivals.RIVALS[rival](s)
    if rival != "ours-fp8":
        with pytest.raises(rivals.Unavailable, match="need a GPU of sm_89 or later"):
            rivals.RIVALS[rival](subjects.subject(64, 1, False))
