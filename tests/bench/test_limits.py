"""Each rival is held against the limit that is its own, and the limits are as counted by hand."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import pytest
import torch
from close import assert_close
from paths import ROOT
from torch import nn

import flowturbo as ft
from flowturbo.models.sit import SIT_CONFIGS

sys.path.insert(0, str(ROOT / "bench"))

import limits
import rivals
import roofline
import subjects
from decoder import Autoencoder


@pytest.mark.parametrize("side, predictor, refiner", [(32, 237.243, 8.518), (64, 1049.08, 37.62)])
def test_calls_of_the_published_model_are_as_counted(side, predictor, refiner):
    """GFLOP of one sample, counted by hand."""
    config = replace(SIT_CONFIGS["SiT-XL/2"], side=side)
    assert 2 * config.macs() / 1e9 == pytest.approx(predictor, rel=2e-5)
    assert 2 * config.refiner().macs() / 1e9 == pytest.approx(refiner, rel=1e-4)


@functools.cache
def published_decoder() -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder().bfloat16()


@pytest.mark.parametrize("side, written, cheapest", [(32, 622.19, 525.6), (64, 2514.52, 2128.0)])
def test_decoding_is_as_counted(side, written, cheapest):
    """GFLOP of one image: as written, and with each convolution of a doubled image as four 2x2 ones
    of the small one.
    """
    vae = published_decoder()
    assert roofline.decode_flops(vae, (1, 4, side, side), doubled=False) / 1e9 == pytest.approx(
        written, rel=1e-5
    )
    assert roofline.decode_flops(vae, (1, 4, side, side)) / 1e9 == pytest.approx(cheapest, rel=1e-4)
    assert not any(m._forward_hooks for m in vae.modules())


def test_four_convolutions_of_the_small_image_do_what_one_of_the_doubled_does():
    """What the limit counts on."""
    x, weight = (
        torch.randn(2, 3, 5, 6, dtype=torch.float64),
        torch.randn(4, 3, 3, 3, dtype=torch.float64),
    )
    doubled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = nn.functional.conv2d(doubled, weight, padding=1)
    made = torch.empty_like(expected)
    first = {
        0: ([0], [1, 2]),
        1: ([0, 1], [2]),
    }  # of an even and an odd row: which taps fall on the first and second small row
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    for i in (0, 1):
        for j in (0, 1):
            taps = torch.stack(
                [
                    torch.stack([weight[:, :, a][..., b].sum((2, 3)) for b in first[j]], dim=-1)
                    for a in first[i]
                ],
                dim=-2,
            )
            made[..., i::2, j::2] = nn.functional.conv2d(padded, taps)[..., i : i + 5, j : j + 6]
    assert_close(made, expected, 1e-12)


HOPPER = {"copy": 4.3e12, "float32": 1e12, "bfloat16": 790e12, "float8_e4m3fn": 1480e12}


def limit(monkeypatch, rival: str, batch: int = 8) -> float:
    """ms an image of H1P5R3 with decoding, by SiT-XL/2 at 256 x 256."""
    monkeypatch.setattr(roofline, "ceilings", lambda device: HOPPER)
    with torch.device("meta"):
        xl = ft.models.sit.SiT(SIT_CONFIGS["SiT-XL/2"])
        refiner = ft.models.sit.SiT(xl.config.refiner())
    noise = torch.empty(batch, 4, 32, 32, device="meta")
    s = subjects.Subject(
        xl,
        refiner,
        published_decoder(),
        torch.device("cuda"),
        torch.bfloat16,
        batch,
        True,
        "full",
        noise,
        noise[:, 0, 0, 0],
    )
    return 1e3 * limits.limit_of(rival, "H1P5R3", s) / batch


@pytest.mark.parametrize("rival", list(rivals.RIVALS))
def test_every_rival_has_the_limit_of_its_dtype(rival, monkeypatch):
    """14 rows of 237 GFLOP, 12 of 8.5 and 525.6 of decoding take 5.00 ms in bfloat16, and where 14
    times 228 are in fp8 3.1.
    """
    found = limit(monkeypatch, rival)
    assert found == pytest.approx(3.11 if rival.endswith("fp8") else 5.00, rel=0.01)


def test_at_batch_one_weights_are_read_in_their_dtype(monkeypatch):
    slow = HOPPER | {"copy": 4.3e10}
    monkeypatch.setitem(HOPPER, "copy", slow["copy"])
    assert limit(monkeypatch, "ours", 1) > 1.7 * limit(monkeypatch, "ours-fp8", 1)


def test_a_limit_is_of_a_rival_there_is():
    with pytest.raises(ValueError, match=r"rival must be one of ours, .*, got 'theirs'"):
        limits.limit_of("theirs", "H1", subjects.subject(64, 1, False))
    assert "boost clocks" in roofline.LIMIT


def test_counting_takes_none_of_the_decoders_memory():
    vae = Autoencoder((16, 16, 32, 32), 1, 8)
    pointers = {p.data_ptr() for p in vae.parameters()}
    roofline.decode_flops(vae, (1, 4, 8, 8))
    assert {p.data_ptr() for p in vae.parameters()} == pointers
    assert all(p.device.type == "cpu" for p in vae.parameters())
