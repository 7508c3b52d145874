"""What needs a CUDA device: the same images there as on the CPU."""

from __future__ import annotations

import pytest
import torch
from close import assert_close, relative_error
from tiny import CONFIG, HEAD_DIM_72, random_sit

import flowturbo as ft
from flowturbo_kernels import OPS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def model(config, device: str, dtype: torch.dtype | None) -> ft.FlowModel:
    return ft.load(random_sit(config, 0), random_sit(config.refiner(), 1), device=device, dtype=dtype)


@pytest.mark.parametrize("config", [CONFIG, HEAD_DIM_72], ids=["24", "72"])
@pytest.mark.parametrize("plan", ["H1P2R2", "C3", "E1S1"])
def test_float32_images_are_the_cpus(config, plan):
    labels = [1, 8, 3]
    truth = ft.sample(model(config, "cpu", torch.float64), plan, labels, guidance=1.5, seed=0)
    cpu, cuda = (ft.sample(model(config, d, torch.float32), plan, labels, guidance=1.5, seed=0) for d in ("cpu", "cuda"))
    assert cuda.is_cuda
    assert_close(cuda, truth, max(1e-5, 4 * relative_error(cpu, truth)))


def test_bfloat16_is_the_default_and_errs_as_bfloat16_does():
    labels = [1, 8, 3]
    default = model(CONFIG, "cuda", None)
    assert default.dtype == torch.bfloat16
    truth = ft.sample(model(CONFIG, "cpu", torch.float64), "H1P2R2", labels, guidance=1.5, seed=0)
    cpu = ft.sample(model(CONFIG, "cpu", torch.bfloat16), "H1P2R2", labels, guidance=1.5, seed=0)
    assert_close(ft.sample(default, "H1P2R2", labels, guidance=1.5, seed=0), truth, 2 * relative_error(cpu, truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_references_err_on_the_gpu_as_on_the_cpu(name, dtype):
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def on(value, device: str, dtype: torch.dtype):
        if isinstance(value, list | tuple):
            return type(value)(on(v, device, dtype) for v in value)
        return value.to(device, dtype) if isinstance(value, torch.Tensor) else value

    for arguments in OPS[name].example(make):
        truth, cpu, cuda = (
            OPS[name](*on(arguments, device, kind)) for device, kind in (("cpu", torch.float64), ("cpu", dtype), ("cuda", dtype))
        )
        for t, a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (truth, cpu, cuda)), strict=True):
            assert_close(b, t, max(2 * relative_error(a, t), 4 * torch.finfo(dtype).eps))
