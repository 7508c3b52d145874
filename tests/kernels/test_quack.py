"""What quack's products and FlashAttention-4 are given, and the algebra of the epilogues, with
stand-ins for both.
"""

from __future__ import annotations

import itertools
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from fake_libraries import Fakes
from fake_machine import GPU

from flowturbo_kernels import (
    _flash_attention,
    _quack,
    attention,
    linear,
    linear_gated_residual,
    linear_quantized,
    linear_quantized_residual,
    use_backend,
)
from flowturbo_kernels._quack import Tile, tiles

E4M3 = torch.float8_e4m3fn
BOUND = {torch.bfloat16: 0.004, torch.float16: 5e-4}
"""Twice the rounding of results."""


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    fakes = Fakes(monkeypatch)
    yield fakes
    fakes.forget()


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_linear(fakes, dtype, activation):
    x, weight, bias = (numbers(*s, dtype=dtype) for s in ((40, 144), (288, 144), (288,)))
    exact = linear.reference(x.double(), weight.double(), bias.double(), activation)
    candidates = _quack.linear(x, weight, bias, activation == "gelu_tanh")
    assert candidates
    for name, run in candidates.items():
        assert_close(run(weight, bias), exact, BOUND[dtype])
        _, A, B, D, C, operands, options = fakes.log[-1]
        assert (A is x, B is weight, C) == (True, True, None)
        assert (D.shape, D.dtype) == ((40, 288), dtype)
        assert operands["bias"].data_ptr() == bias.data_ptr()
        tile = Tile(*(options[k] for k in ("tile_M", "tile_N", "pingpong", "cluster_M", "split_k")))
        assert str(tile) == name


@pytest.mark.parametrize("dtype", BOUND)
def test_gated_residual_has_a_row_of_gates_for_each_image(fakes, dtype):
    B, T, K, N = 3, 10, 144, 288
    x, weight, bias, residual, modulations = (
        numbers(*s, dtype=dtype) for s in ((B, T, K), (N, K), (N,), (B, T, N), (B, 6 * N))
    )
    gate = modulations.chunk(6, dim=1)[5]
    exact = linear_gated_residual.reference(
        *(t.double() for t in (x, weight, bias, residual, gate))
    )
    candidates = _quack.linear_gated_residual(x, weight, bias, residual, gate)
    assert candidates
    for run in candidates.values():
        assert_close(run(weight, bias), exact, BOUND[dtype])
        _, A, other, D, C, operands, _ = fakes.log[-1]
        assert (A is x, C is residual, operands["gate"] is gate) == (True, True, True)
        assert (other.shape, other.stride()) == ((B, N, K), (0, K, 1))
        assert other.data_ptr() == weight.data_ptr()
        assert D.shape == (B, T, N)


def fp8_layer(M: int, K: int, N: int) -> tuple[torch.Tensor, ...]:
    """(q, scales of its rows, weight, weight_scale, bias)."""
    q, weight = numbers(M, K, dtype=E4M3), numbers(N, K, dtype=E4M3)
    scale, weight_scale = (numbers(n, dtype=torch.float32).abs() / 12 + 0.1 for n in (M, N))
    return q, scale, weight, weight_scale, numbers(N)


@pytest.mark.parametrize("rows", [True, False], ids=["a scale a row", "a static scale"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("to_fp8", [False, True])
def test_fp8(fakes, gelu, to_fp8, rows):
    """linear_quantized's candidates: y from rows and columns of fp8 with their scales; in fp8 over
    a static scale, within e4m3's rounding (0.026) of y.
    """
    q, scale, *cold = fp8_layer(40, 144, 288)
    x_scale, activation = scale if rows else None, "gelu_tanh" if gelu else None
    y = (
        q.double()
        @ cold[0].double().t()
        * cold[1].double()
        * (scale.double()[:, None] if rows else 1)
    )
    y = y + cold[2].double()
    y = F.gelu(y, approximate="tanh") if gelu else y
    out_scale = y.abs().max().float().view(1) / 448 if to_fp8 else None
    candidates = linear_quantized.backends["triton"].candidates(
        q, x_scale, *cold, activation, out_scale
    )
    found = {name: run for name, run in candidates.functions.items() if "quack" in name}
    assert found
    for run in found.values():
        result = run(*candidates.cold)
        assert result.dtype == (E4M3 if to_fp8 else torch.bfloat16)
        got = result.double() * (out_scale if to_fp8 else 1)
        assert_close(got, y, 0.03 if to_fp8 else 0.004)
        assert fakes.log[-1][-1]["post_init_attrs"] == (("fp8_slow_accum", False),)
    if to_fp8:  # too small a scale: the largest are cut off
        most = 448 * (out_scale / 4).double()
        got = linear_quantized_by_quack(q, x_scale, *cold, activation, out_scale / 4)
        assert got.double().abs().max() == 448
        assert_close(got.double() * out_scale / 4, y.clamp(-most, most), 0.03)
    with use_backend("triton"):
        alone = linear_quantized.backends["triton"].candidates(
            q, x_scale, *cold, activation, out_scale
        )
    assert not any("quack" in name for name in alone.functions)


def linear_quantized_by_quack(*args: object) -> torch.Tensor:
    """The operation's result where quack's first tile is the fastest."""
    candidates = linear_quantized.backends["triton"].candidates(*args)
    return candidates.functions["quack 128x144"](*candidates.cold)


def test_fp8_products_of_other_dtypes_are_not_quacks(fakes):
    q, scale, weight, weight_scale, bias = fp8_layer(40, 144, 288)
    args = q, scale, weight, weight_scale
    assert _quack.fp8_candidates(*args, bias, gelu=False)
    assert not _quack.fp8_candidates(*args, bias.float(), gelu=False)
    assert not _quack.fp8_candidates(q.to(bias.dtype), *args[1:], bias, gelu=False)
    residual = numbers(1, 40, 288), numbers(1, 288)
    functions = linear_quantized_residual.backends["triton"].candidates(
        q[None], *args[1:], bias, *residual
    )[1]
    assert not any("quack" in name for name in functions)


def test_what_quack_can_not_take_is_left_out(fakes):
    x, weight, bias = numbers(40, 144), numbers(288, 144), numbers(288)
    odd = numbers(41 * 144).view(-1)[1 : 1 + 40 * 144].view(40, 144)  # its address
    refused = {
        "float32": (x.float(), weight.float(), bias.float()),
        "K": (x[:, :140], weight[:, :140], bias),
        "K no multiple of 8": (numbers(40, 140), numbers(288, 140), bias),
        "N no multiple of 8": (x, numbers(284, 144), numbers(284)),
        "address": (odd, weight, bias),
        "weight by columns": (x, numbers(144, 288).t(), bias),
        "strided bias": (x, weight, numbers(576)[::2]),
    }
    taken = [name for name, args in refused.items() if _quack.linear(*args, False)]
    assert taken == []
    wide = numbers(40, 288)[:, :144]  # rows may be strided
    assert _quack.linear(wide, weight, bias, False)
    y, gate = numbers(4, 10, 288), numbers(4, 288)
    args = (x.view(4, 10, 144), weight, bias)
    assert _quack.linear_gated_residual(*args, y, gate)
    assert not _quack.linear_gated_residual(*args, y.float(), gate)
    assert not _quack.linear_gated_residual(*args, y, gate.float())


def test_tiles_fill_the_device_or_share_its_blocks():
    """At SiT-XL's sizes; each name is another kernel."""
    for images, (K, N) in itertools.product(
        (1, 2, 8, 32), ((1152, 3456), (1152, 4608), (4608, 1152), (1152, 1152))
    ):
        for found in (tiles(1, 512 * images, N, K), tiles(2 * images, 256, N, K)):
            assert len({str(tile) for tile in found}) == len(found) <= 6
            assert all(tile.columns == 144 for tile in found)
    assert [str(t) for t in tiles(2, 256, 1152, 4608)] == [
        "quack 128x144",
        "quack 64x144",
        "quack 128x144 split 2",
        "quack 128x144 split 4",
        "quack 64x144 split 2",
    ]
    names = ["quack 128x144", "quack 256x144", "quack 128x144 ping-pong"]
    assert [str(t) for t in tiles(1, 4096, 4608, 1152)] == names
    assert {t.columns for t in tiles(1, 4096, 3072, 1024)} == {128}
    assert [t.cluster for t in tiles(16, 256, 1152, 4608)] == [2, 1, 2]


def test_compiled_kernels_lie_below_our_cache_folder(fakes, monkeypatch, tmp_path):
    import quack.cache

    class Again(dict):
        """sys.modules as it is before quack's first import."""

        def __contains__(self, name: object) -> bool:
            return name != "quack" and super().__contains__(name)

    monkeypatch.setattr(_quack, "sys", type("sys", (), {"modules": Again(sys.modules)}))
    _quack._load()
    assert str(tmp_path / "quack") == quack.cache.CACHE_DIR
    quack.cache.CACHE_DIR = None
    monkeypatch.setenv("QUACK_CACHE_DIR", "/elsewhere")
    _quack._load()
    assert quack.cache.CACHE_DIR is None
    monkeypatch.delenv("QUACK_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "file"))
    _quack._load()
    assert (quack.cache.CACHE_DIR, quack.cache.CACHE_ENABLED) == (None, False)


@pytest.mark.parametrize("theirs", [None, "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
def test_flash_attention_4_keeps_kernels_on_disk_unless_the_user_decided(
    fakes, monkeypatch, tmp_path, theirs
):
    enabled, folder = names = [
        f"FLASH_ATTENTION_CUTE_DSL_CACHE_{what}" for what in ("ENABLED", "DIR")
    ]
    if theirs:
        monkeypatch.setenv(theirs, "/elsewhere")
    monkeypatch.setattr(_flash_attention.sys, "modules", {})
    before = {name: os.environ.get(name) for name in names}
    with _flash_attention._settings_at_import():
        ours = "1", str(tmp_path / "flash-attention-4")
        expected = (None, "/elsewhere") if theirs else ours
        assert (os.environ.get(enabled), os.environ[folder]) == expected
    assert {name: os.environ.get(name) for name in names} == before


def test_flash_attention_4_reads_the_packed_qkv_in_place(fakes):
    qkv = numbers(2, 10, 3, 2, 72)
    run = _flash_attention.candidates(qkv, attention.reference)["flash-attention 4 128x128"]
    y = run()
    assert_close(y, attention.reference(qkv.double()), 0.004)
    q, k, v, tile, out = fakes.log[-1]
    assert tile == (128, 128)
    assert [t.shape for t in (q, k, v, out)] == [(2, 10, 2, 72)] * 4
    addresses = [qkv.data_ptr() + i * 2 * 72 * 2 for i in range(3)]
    assert [t.data_ptr() for t in (q, k, v)] == addresses
    assert out.data_ptr() == y.data_ptr()


def test_flash_attention_4_is_not_offered_what_it_would_copy(fakes):
    def offered(qkv: torch.Tensor) -> bool:
        return any("flash-att" in n for n in _flash_attention.candidates(qkv, attention.reference))

    qkv = numbers(2, 10, 3, 2, 72)
    assert offered(qkv)
    assert not offered(qkv.float())
    assert not offered(numbers(2, 10, 3, 2, 68))
    assert not offered(qkv.transpose(3, 4).contiguous().transpose(3, 4))
    fakes.versions["flash-attn-4"] = "4.0.0b9"
    _flash_attention.LIBRARY.forget()
    assert not offered(qkv)
    assert _flash_attention.unavailable(GPU).endswith("b9 is too old: 4.0.0b36 or later is needed")


SETTINGS = {
    "torch cudnn": "enable_cudnn_sdp",
    "torch flash": "enable_flash_sdp",
    "torch efficient": "enable_mem_efficient_sdp",
}


@pytest.mark.parametrize("name, setting", SETTINGS.items())
def test_a_backend_of_torch_that_is_turned_off_is_no_candidate(name, setting):
    qkv = numbers(2, 10, 3, 2, 72)

    def offered() -> set[str]:
        names = _flash_attention.candidates(qkv, attention.reference)
        return {n for n in names if n.startswith("torch")}

    assert offered() == set(SETTINGS)
    turn = getattr(torch.backends.cuda, setting)
    try:
        turn(False)
        assert offered() == set(SETTINGS) - {name}
    finally:
        turn(True)


def test_attention_offers_its_own_tiles_first_and_alone_where_triton_is_asked_for(fakes):
    candidates = attention.backends["triton"].candidates
    names = list(candidates(numbers(2, 10, 3, 2, 72)).functions)
    assert names[0] == "triton (128, 128, 8, 2)"
    assert set(SETTINGS) | {"flash-attention 4 128x128"} < set(names)
    with use_backend("triton"):
        alone = candidates(numbers(2, 10, 3, 2, 72)).functions
    assert all(name.startswith("triton") for name in alone)


def test_torchs_flash_attention_gives_our_layout(monkeypatch):
    """The operator has an implementation for the CPU under another name: its results stand in."""
    qkv = numbers(2, 10, 3, 2, 72)
    for name in SETTINGS:
        short = name.removeprefix("torch ")
        monkeypatch.setitem(
            _flash_attention._BACKENDS,
            short,
            lambda q, k, v: (F.scaled_dot_product_attention(q, k, v), None),
        )
        y = _flash_attention._torch(short, qkv)
        assert_close(y, attention.reference(qkv.double()), 0.004)
