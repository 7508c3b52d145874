"""csrc's kernels as a GPU runs them, thread by thread, but on the CPU: every index, mask, shuffle
and barrier of the device code, against float64 references.

What csrc's `on_host` functions share with the kernels is the arithmetic alone. Memory around the
tensors holds NaN, so that a number read from there shows; results are NaN before.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_close
from ops import DTYPES, tensors
from torch import Tensor

from flowturbo_kernels import OPS, _cuda, _nvrtc, adaln, group_norm

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.slow,
]
FILES = {
    "adaln.cu": ("AdaLN", "adaln_entries"),
    "group_norm_silu.cu": ("GroupNorm", "group_norm_entries"),
    "velocity_update.cu": ("VelocityUpdate", "velocity_update_entries"),
}
EMULATOR = Path(__file__).parents[1] / "helpers" / "emulator.cpp"
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of a result that is rounded once: half a unit of its last place, and float32's sums."""


@functools.cache
def emulated(file: str) -> Any:
    struct, entries = FILES[file]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "emulated.so"
        defines = f'-DSOURCE="{file}"', f"-DARGS={struct}", f"-DENTRIES={entries}"
        how = "-x", "c++", "-O1", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-w"
        command = ["nvcc", *how, f"-I{_nvrtc.sources()}", *defines, "-o", library, EMULATOR]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return ctypes.CDLL(str(library))


def launch(
    name: str, grid: tuple[int, ...], threads: int, shared: int, args: ctypes.Structure
) -> None:
    run = emulated(_nvrtc.FILES[name.split("::")[1].split("<")[0]]).run
    x, y = (*grid, 1)[:2]
    assert not run(name.encode(), x, y, threads, bytes(args)), f"there is no {name}"


@pytest.fixture(autouse=True)
def on_threads(monkeypatch):
    """The cuda backends run here, and memory that they allocate is NaN."""
    monkeypatch.setattr(_cuda, "launch", launch)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda t: torch.full_like(t, float("nan"), memory_format=torch.preserve_format),
    )


def poisoned(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
    return torch.full(torch.Size(shape[0] if len(shape) == 1 else shape), float("nan"), dtype=dtype)


def among_nans(t: Tensor, odd: int = 0) -> Tensor:
    """The same values and strides, aligned to 16 bytes or `odd` numbers off, with NaN around."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = torch.full((span + 128 + odd,), float("nan"), dtype=t.dtype)
    start = 64 + odd + -memory.data_ptr() % 64 // t.element_size()
    return memory[start:].as_strided(t.shape, t.stride()).copy_(t)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return among_nans(torch.randn(*shape).to(dtype))


def check(name: str, *args: Any) -> None:
    full = OPS[name]._positional(args, {})
    assert OPS[name].backends["cuda"].unsupported(*full) is None
    exact = OPS[name].reference(*map(_double, full))
    for got, truth in zip(
        tensors(OPS[name].backends["cuda"].run(*full)), tensors(exact), strict=True
    ):
        assert_close(got, truth, BOUNDS[args[0].dtype])


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return list(map(_double, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, D",
    [(1, 1, 8), (2, 7, 72), (3, 5, 384), (2, 3, 768), (2, 9, 1152), (1, 2, 1136)],
)
def test_adaln(dtype, B, T, D, monkeypatch):
    for rows_of_a_warp in (1, 4):
        # as where there are many rows
        monkeypatch.setattr(adaln, "_BUSY", 10**6 if rows_of_a_warp == 1 else B * T // 4 or 1)
        gate, shift, scale = normal(dtype, B, 6 * D).chunk(6, dim=1)[2:5]
        x, y = normal(dtype, B, T, D), normal(dtype, B, T + 1, D)[:, 1:]
        check("adaln_modulate", x, shift, scale)
        check("gated_residual_adaln", x, y, gate, shift, scale)


def test_rows_of_a_warp_do_not_cross_images(monkeypatch):
    """Where an image's rows are no multiple of a warp's."""
    monkeypatch.setattr(adaln, "_BUSY", 1)
    x, shift, scale = normal(torch.float32, 3, 11, 64), *normal(torch.float32, 2, 3, 64)
    *_, args = adaln.cuda_call(x, None, None, shift, scale, None, x, 1e-6)
    assert args.per_warp == 8
    check("adaln_modulate", x, shift, scale)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("dtype, raw_dtype", [(d, r) for d in DTYPES for r in DTYPES])
def test_updates(dtype, raw_dtype, odd):
    if dtype not in (torch.float32, raw_dtype):
        pytest.skip("no kernel has these dtypes")
    for N, C, H, W in ((1, 4, 32, 32), (3, 4, 5, 7), (2, 3, 8, 8)):
        x, *others = (among_nans(torch.randn(N, C, H, W).to(dtype), odd) for _ in range(5))
        raw, base = normal(raw_dtype, 2 * N, C, H, W), normal(dtype, 2 * N, C, H, W)
        scale, weights = torch.rand(N, 1, 1, 1), [0.3, -0.2, 0.1, 0.05]
        for count in (0, 1, 4):
            guided = raw, scale, C - 1, 0.1, base, others[:count], weights[:count]
            check("guided_update", x, *guided)
            check("guided_update", x, raw[:N], None, 1, 0.1, base[:N], *guided[-2:])
            check("guided_update", x, raw[:N], None, 1, 0.1, None, *guided[-2:])
            if count:
                check("velocity_update", x, others[:count], weights[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, C, H, W, groups",
    [
        (1, 512, 8, 9, 32),
        (2, 256, 11, 13, 32),
        (1, 128, 16, 16, 32),
        (2, 96, 5, 7, 32),
        (1, 8, 40, 61, 8),
        (3, 16, 1, 3, 2),
        (1, 48, 9, 9, 3),
    ],
)
def test_group_norm(dtype, N, C, H, W, groups, monkeypatch):
    for blocks in (group_norm._FULL, 1):  # few lanes in a tile, and as many as threads suffice for
        monkeypatch.setattr(group_norm, "_FULL", blocks)
        x = torch.randn(N, C, H, W) + torch.randn(C)[:, None, None]
        x = among_nans(x.to(dtype).contiguous(memory_format=torch.channels_last))
        check("group_norm_silu", x, normal(dtype, C), normal(dtype, C), groups)


def test_group_norm_far_from_zero():
    x = torch.randn(1, 64, 20, 20) + 100
    x = among_nans(x.contiguous(memory_format=torch.channels_last))
    ones = torch.ones(64)
    truth = OPS["group_norm_silu"].reference(x.double(), ones.double(), ones.double(), 32)
    got = OPS["group_norm_silu"].backends["cuda"].run(x, ones, ones, 32, 1e-6)
    assert_close(got, truth, 1e-5)  # a sum of squares would lose 1e-3


def test_a_wrong_index_would_show():
    """A kernel that is asked for one row too many reads a NaN."""
    x, shift, scale = normal(torch.float32, 1, 4, 64), *normal(torch.float32, 2, 1, 64)
    out = torch.zeros(1, 5, 64)
    name, _, threads, args = adaln.cuda_call(x, None, None, shift, scale, None, out, 1e-6)
    args.T = 5
    launch(name, (2,), threads, 0, args)
    assert out[0, :4].isfinite().all()
    assert out[0, 4].isnan().all()
