"""The ends of a decoder: latents unscaled and images as bytes, in torch and in Triton."""

from __future__ import annotations

import pytest
import torch
from close import assert_close, relative_error
from ops import DTYPES, ENDS, examples, strided, tensors
from torch import Tensor

from flowturbo_kernels import OPS, image_bytes, unscale_latents, use_backend

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]
LEVELS = torch.arange(-40, 300).double().add(0.5).sub(128).div(127.5)
"""What lies in the middle of each byte, and beyond the first and last."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("result", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("scale, shift", [(0.18215, 0.0), (0.3611, 0.1159)])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 9, 5), (2, 16, 33, 31), (1, 1, 1, 1)])
def test_latents_are_unscaled_and_rounded_once(shape, scale, shift, dtype, result, backend):
    x = torch.randn(shape).to(dtype)
    truth = x.double() / scale + shift
    for given in (x, strided(x)):
        with use_backend(backend):
            got = unscale_latents(given, scale, shift, result)
        assert got.dtype == result
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_close(got, truth, relative_error(truth.to(result), truth) + 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bytes_are_whole_parts_of_clamped_levels(dtype, backend):
    x = LEVELS[torch.randperm(len(LEVELS))[:330]].view(2, 3, 5, 11).to(dtype)
    truth = (127.5 * x.double() + 128).floor().clamp(0, 255)
    for given in (x, x.contiguous(memory_format=torch.channels_last), strided(x)):
        with use_backend(backend):
            got = image_bytes(given)
        assert got.dtype == torch.uint8
        assert torch.equal(got.double(), truth.permute(0, 2, 3, 1))


@interpreted
def test_the_kernel_gives_torchs_bytes_at_every_border():
    """Product and sum are rounded one after the other, as in torch."""
    borders = (torch.arange(0, 257).float() - 128) / 127.5
    near = [torch.nextafter(borders, torch.tensor(float(side))) for side in (-9, 9)]
    x = torch.cat([borders, *near, -borders, torch.tensor([1e30, -1e30])])
    x = x[None, None, None]
    with use_backend("triton"):
        got = image_bytes(x)
    assert torch.equal(got, (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", ENDS)
def test_torch_checks_their_operators(name):
    for args in examples(name, torch.float32):
        torch.library.opcheck(OPS[name].library, args)


@pytest.mark.parametrize("name", ENDS)
def test_their_references_agree_with_float64(name):
    for args in examples(name, torch.float64):
        (got,) = tensors(OPS[name](*args))
        x: Tensor = args[0]
        if name == "image_bytes":
            truth = (127.5 * x + 128).floor().clamp(0, 255).permute(0, 2, 3, 1)
            assert torch.equal(got.double(), truth)
        else:
            assert torch.equal(got, (x / args[1] + args[2]).to(args[3]))
