"""How images are cut into tiles: enough of them for a device, enough loads at a time; and what the
doubling is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close, relative_error
from torch import Tensor

from flowturbo_kernels import (
    _group_norm,
    _triton,
    double_pixels,
    doubled_convolution,
    interleaved_group_norm,
    residual_group_norm,
    shifted_group_norm,
    shifted_sum,
    sizes,
    summed_weights,
    use_backend,
)
from flowturbo_kernels._group_norm import Tiling
from flowturbo_kernels.doubling import interleave

MULTIPROCESSORS = 132
"""Of an H100 or H200."""
THREADS = 256


def image(batch: int, channels: int, side: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(batch, channels, side, side, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "channels, side, blocks",
    [
        (512, 32, 32), (512, 64, 128), (512, 128, 512), (256, 128, 256), (256, 256, 1024),
        (128, 256, 512),
        # of 512 x 512 images, the last two levels
        (256, 512, 4096), (128, 512, 2048),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 8])
def test_one_image_of_every_level_of_a_decoder_occupies_the_device(channels, side, blocks, batch):
    """Where it has a hundred tiles of 32 KB: the first level has 32, and had 4."""
    tiling = Tiling.of(image(batch, channels, side), 32)
    assert batch * tiling.parts(image(batch, channels, side)) == batch * blocks
    assert tiling.pixels * channels * 2 == 32 << 10
    assert batch * blocks >= min(MULTIPROCESSORS - 4, batch * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thread_has_eight_loads_of_16_bytes(dtype):
    for channels in (128, 256, 512):
        tiling = Tiling.of(image(1, channels, 64, dtype), 32)
        assert tiling.pixels * channels * dtype.itemsize == THREADS * 8 * 16


def test_a_tile_of_any_shape_is_held_by_its_threads():
    for channels in range(1, 700):
        for groups in {1, channels, *(g for g in (2, 32) if channels % g == 0)}:
            for dtype in (torch.float32, torch.bfloat16):
                tiling = Tiling.of(image(1, channels, 512, dtype), groups)
                numbers = tiling.pixels * tiling.block_g * tiling.block_c
                assert channels <= tiling.block_g * tiling.block_c
                assert numbers <= THREADS * 8 * (16 // dtype.itemsize)


def launches(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]
) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels that a call launches, and their grids."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        _triton.Kernel,
        "launch",
        lambda kernel, grid, *args, **options: seen.append((kernel.__name__, grid)),
    )
    with use_backend("triton"):
        run()
    return seen


@pytest.mark.parametrize("side, merged", [(32, False), (64, True)])
def test_only_many_parts_are_merged_by_a_kernel_of_their_own(side, merged, monkeypatch):
    monkeypatch.setattr("flowturbo_kernels._op.unavailable", lambda *_: None)
    x, v = image(8, 512, side), torch.empty(512, dtype=torch.bfloat16, device="meta")
    parts = side * side // 32
    seen = launches(monkeypatch, lambda: shifted_group_norm(x, v, v, v))
    middle = [("_merge_kernel", (4, 8))] if merged else []
    ends = ("_statistics_kernel", (parts, 8)), ("_apply_kernel", (parts, 8))
    assert seen == [ends[0], *middle, ends[1]]
    seen = launches(monkeypatch, lambda: residual_group_norm(x, v, x, None, v, v))
    assert seen == [("_add_kernel", (parts, 8)), *middle, ends[1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("parts", [1, 2, 31, 32, 33, pytest.param(200, marks=pytest.mark.slow)])
def test_merged_statistics_are_those_of_the_whole(parts, monkeypatch):
    """With parts that are far from each other, the last of them smaller, and by both ways of
    merging.
    """
    found: list[tuple[Any, ...]] = []
    apply = _group_norm._apply_kernel.launch
    monkeypatch.setattr(
        _group_norm._apply_kernel,
        "launch",
        lambda grid, *args, **options: found.append(args) or apply(grid, *args, **options),
    )
    C, G = 128, 32
    pixels = Tiling.of(image(1, C, 1024, torch.float32), G).pixels
    W = parts * pixels - 3
    x = torch.randn(2, C, 1, W) + 50 * torch.arange(W).div(pixels).floor()
    x = x.contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(C), torch.zeros(C)
    with use_backend("triton"):
        got = shifted_group_norm(x, None, ones, zeros, G, 1e-6, False)
    truth = F.group_norm(x.double(), G, eps=1e-6)
    assert found[0][7] == (parts if pixels < W else 1)
    assert_close(got, truth, 2 * relative_error(F.group_norm(x, G, eps=1e-6), truth) + 4e-7)


# Doubling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H, W, C, O", [(1, 1, 3, 2), (5, 4, 8, 8), (2, 7, 5, 4)])
def test_four_convolutions_are_the_doubling_and_its_convolution(H, W, C, O, dtype):
    """In float64 to its rounding. Summed weights are rounded to their dtype once: in that one the
    error grows by that of the weights, half an eps each at most.
    """
    x, kernel = torch.randn(2, C, H, W), torch.randn(O, C, 3, 3)
    x, kernel = x.to(dtype), kernel.to(dtype)
    truth = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), kernel.double(), padding=1)
    summed = summed_weights(kernel)
    assert summed.dtype == dtype
    got = interleave(F.conv2d(x.double(), summed.double(), padding=1))
    bound = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    assert_close(got, truth, bound)
    if dtype != torch.float64:
        assert relative_error(got, truth) > 1e-9  # the rounding is there, and found


def test_sums_of_weights_are_rounded_once():
    kernel = torch.randn(6, 5, 3, 3).bfloat16()
    assert torch.equal(summed_weights(kernel), summed_weights(kernel.double()).bfloat16())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_both_ways_of_a_doubled_convolution_agree(backend, monkeypatch):
    """With the norm after it, a residual and a shortcut's bias before it; in float32."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    C, G = 8, 4
    y, residual = (torch.randn(2, C, 5, 3) for _ in range(2))
    shift, other, kernel = torch.randn(C), torch.randn(C), torch.randn(C, C, 3, 3)
    norm = torch.randn(C), torch.randn(C), torch.randn(C), G, 1e-6, True
    total = y, shift, residual, other
    wide = [t.double() for t in total]
    h = F.interpolate(shifted_sum(*wide), scale_factor=2.0)
    h = F.conv2d(h, kernel.double(), norm[0].double(), padding=1)
    truths = h, shifted_group_norm(h, None, *(t.double() for t in norm[1:3]), *norm[3:])
    with use_backend(backend):
        whole = doubled_convolution(total, kernel, None, *norm)
        four = F.conv2d(shifted_sum(*total), summed_weights(kernel), padding=1)
        parts = interleaved_group_norm(four, *norm)
    for got in (whole, parts):
        for result, truth in zip(got, truths, strict=True):
            assert_close(result, truth, 2e-6)


def test_the_default_is_one_convolution(monkeypatch):
    """Where nothing may be measured; and the candidates are those two."""
    asked = []
    monkeypatch.setattr(
        "flowturbo_kernels.doubling.Candidates.run",
        lambda candidates: asked.append(candidates) or (y, y),
    )
    y, v, kernel = torch.randn(1, 4, 3, 3), torch.randn(4), torch.randn(4, 4, 3, 3)
    doubled_convolution((y, v, y, None), kernel, summed_weights(kernel), v, v, v, 2, 1e-6)
    assert list(asked[0].functions) == ["one convolution", "four 2 x 2 convolutions"]
    results = [run(*asked[0].cold) for run in asked[0].functions.values()]
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5)


def test_the_walk_has_every_operation_of_a_decoder():
    def make(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    walked = {name for name, _ in sizes.vae(make, 1)}
    assert walked >= {
        "group_norm_silu", "shifted_group_norm", "residual_group_norm", "shifted_sum",
        "double_pixels", "interleaved_group_norm", "unscale_latents", "image_bytes",
    }  # fmt: skip
    assert double_pixels(make(1, 3, 2, 2)).shape == (1, 3, 4, 4)
