"""What is given in float32 is computed in float32 on a GPU too, where torch lets cuDNN's
convolutions round to TF32 by default.

Products do not, by torch's default, nor do torch's attention kernels (which sum three TF32
products: OpMultiplyAddFastF32). So the law is that nothing of ours convolves there. A VAE in
    float32 is its user's network, and follows torch.backends.cudnn.allow_tf32.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from close import assert_close, relative_error
from ops import CASES, OPS, case, mapped, tensors
from tiny import CONFIG, HEAD_DIM_72, random_sit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowturbo as ft
from flowturbo.solver.steps import Move
from flowturbo_kernels import refiner_forward, use_backend

PATCH = importlib.import_module("flowturbo_kernels.patch_embed")


class Recorded(TorchDispatchMode):
    """Names of all of torch's operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def convolutions(self) -> list[str]:
        return [name for name in self.names if "conv" in name]


def test_a_convolution_would_be_seen():
    with Recorded() as seen:
        torch.nn.functional.conv2d(
            torch.empty(1, 4, 8, 8, device="meta"),
            torch.empty(16, 4, 2, 2, device="meta"),
            stride=2,
        )
    assert seen.convolutions()


@pytest.mark.parametrize("name, index", CASES)
def test_no_reference_convolves_off_the_cpu(name, index):
    """On torch's device without memory, which takes a GPU's way and needs none."""
    args = mapped(case(name, index, torch.float32), lambda t: t.to("meta"))
    with Recorded() as seen, torch.no_grad():
        results = tensors(OPS[name].reference(*args))
    assert {t.device.type for t in results} == {"meta"}
    assert seen.names
    assert not seen.convolutions()


@pytest.mark.parametrize("index", [i for name, i in CASES if name == "patch_embed"])
def test_the_patch_embedding_does_not_convolve_on_a_gpu(index):
    """On tensors that are said to be on one, and hold nothing."""
    with FakeTensorMode(), torch.no_grad():
        args = mapped(
            case("patch_embed", index, torch.float32),
            lambda t: torch.empty(t.shape, device="cuda:0"),
        )
        with Recorded() as seen:
            result = PATCH.patch_embed.reference(*args)
    assert result.device == torch.device("cuda", 0)
    assert seen.names
    assert not seen.convolutions()


@pytest.mark.parametrize("config", [CONFIG, HEAD_DIM_72], ids=["24", "72"])
def test_no_network_of_ours_convolves_off_the_cpu(config):
    predictor, refiner = (random_sit(c, 0).to("meta") for c in (config, config.refiner()))
    x, v = (
        torch.empty(2, config.channels, config.side, config.side, device="meta") for _ in range(2)
    )
    t, y = torch.empty(2, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    with use_backend("reference"), Recorded() as seen, torch.no_grad():
        results = [predictor(x, t, y), refiner(x, t, y, v)]
        modulations = [m[0] for m in refiner.modulations_at([0.4], y, None)]
        results += refiner.evaluate_and_move(x, modulations, Move(x, 0.1), None, 4, v=v, base=v)
        results += refiner_forward(refiner.refiner_weights(), modulations, x, v, None, 4, 0.1)
    assert {r.device.type for r in results} == {"meta"}
    assert not seen.convolutions()


# Numbers


def tf32(t: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, to the nearest, ties to even, as tensor cores take
    float32.
    """
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


class Tf32Convolutions(TorchDispatchMode):
    """Convolutions of float32 multiply what TF32 leaves of their operands, and sum in float32, as
    cuDNN's do.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func) and args[0].dtype == torch.float32:
            args = tf32(args[0]), tf32(args[1]), *args[2:]
        return func(*args, **(kwargs or {}))


def test_rounding_to_tf32():
    t = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 3 * 2**-12, 3e38, 0.0])
    assert tf32(t).equal(
        torch.tensor([1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -1 - 2**-10, float(tf32(t[5:6])), 0.0])
    )


def products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(PATCH, "_convolves", lambda x: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("index", [i for name, i in CASES if name == "patch_embed"])
def test_the_product_of_patches_is_the_convolution(index, dtype, monkeypatch):
    args = case("patch_embed", index, dtype, seed=1)
    plain = PATCH.patch_embed.reference(*args)
    truth = PATCH.patch_embed.reference(*mapped(args, Tensor.double))
    products_only(monkeypatch)
    got = PATCH.patch_embed.reference(*args)
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    assert_close(got, truth, 1.5 * relative_error(plain, truth) + torch.finfo(dtype).eps)


@pytest.mark.parametrize("index", [i for name, i in CASES if name == "patch_embed"])
def test_gradients_of_the_product_are_the_convolutions(index, monkeypatch):
    def gradients() -> list[Tensor]:
        args = mapped(
            case("patch_embed", index, torch.float64, seed=1), lambda t: t.clone().requires_grad_()
        )
        result = PATCH.patch_embed.reference(*args)
        return list(
            torch.autograd.grad((result * torch.arange(result.shape[-1])).sum(), tensors(args))
        )

    expected = gradients()
    products_only(monkeypatch)
    for got, truth in zip(gradients(), expected, strict=True):
        assert_close(got, truth, 1e-13)


@pytest.mark.parametrize("config", [CONFIG, HEAD_DIM_72], ids=["24", "72"])
@pytest.mark.parametrize("plan", ["H1P2R2", "C3", "E1S1"])
def test_images_in_float32_do_not_hang_on_tf32(plan, config, monkeypatch):
    """The bound is that of test_gpu.py, for the images of a GPU; a convolution in TF32 would pass
    it ten times over.
    """

    def sampled(dtype: torch.dtype) -> Tensor:
        networks = random_sit(config, 0), random_sit(config.refiner(), 1)
        model = ft.load(*networks, device="cpu", dtype=dtype, backend="reference")
        return ft.sample(model, plan, [1, 8, 3], guidance=1.5, seed=0)

    truth = sampled(torch.float64)
    bound = max(1e-5, 4 * relative_error(sampled(torch.float32), truth))
    with Tf32Convolutions():
        assert relative_error(sampled(torch.float32), truth) > 5 * bound
        products_only(monkeypatch)
        assert_close(sampled(torch.float32), truth, bound)
