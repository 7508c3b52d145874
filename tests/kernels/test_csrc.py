"""csrc: its arithmetic, run on the CPU through the extension, against the references; its sources
compiled; its kernels' resources.

The launches themselves need a GPU: tests/kernels/test_gpu.py.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch
from close import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ops import DTYPES, assert_errs_as_torch, tensors
from torch import Tensor

from flowturbo_kernels import (
    OPS,
    BackendError,
    _cuda,
    _nvrtc,
    adaln,
    group_norm,
    guidance,
    use_backend,
    velocity_update,
)

try:
    extension: Any = importlib.import_module("flowturbo_kernels._C")
except ImportError:
    extension = None
built = pytest.mark.skipif(extension is None, reason="the extension was not built: no nvcc")


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def adaln_on_host(x, shift, scale, eps=1e-6):
    out = nan(*x.shape, dtype=x.dtype)
    x, shift, scale = map(_cuda.in_vectors, (x, shift, scale))
    name, _, _, args = adaln.cuda_call(x, None, None, shift, scale, None, out, eps)
    extension.run_on_host(name, bytes(args))
    return out


def seam_on_host(x, y, gate, shift, scale, eps=1e-6):
    total, out = nan(*x.shape, dtype=x.dtype), nan(*x.shape, dtype=x.dtype)
    operands = list(map(_cuda.in_vectors, (x, y, gate, shift, scale)))
    name, _, _, args = adaln.cuda_call(*operands, total, out, eps)
    extension.run_on_host(name, bytes(args))
    return total, out


MODULE = importlib.import_module("flowturbo_kernels.velocity_update")


def update_on_host(x, velocities, weights):
    out = nan(*x.shape, dtype=x.dtype)
    name, _, _, args = MODULE.cuda_call(
        x, None, None, None, [v[: len(x)] for v in velocities], weights, out, None
    )
    extension.run_on_host(name, bytes(args))
    return out


def guided_on_host(x, raw, scale, channels, weight, base=None, velocities=(), weights=(), out=None):
    out = nan(*x.shape, dtype=x.dtype) if out is None else out
    velocity = nan(*raw.shape, dtype=x.dtype)
    scales = None if scale is None else guidance.scale_per_image(raw, scale).float()
    others = [v[: len(x)] for v in velocities]
    name, _, _, args = MODULE.cuda_call(
        x, raw, scales, base, others, weights, out, velocity, weight, channels
    )
    extension.run_on_host(name, bytes(args))
    return out, velocity


def group_norm_on_host(x, weight, bias, groups=32, eps=1e-6):
    out = nan(*x.shape, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    buffers = [torch.full_like(t, float("nan")) for t in group_norm.cuda_buffers(x, groups)]
    for name, _, _, args in group_norm.cuda_calls(x, weight, bias, groups, eps, *buffers, out):
        extension.run_on_host(name, bytes(args))
    return out


HOST = {
    "adaln_modulate": adaln_on_host,
    "gated_residual_adaln": seam_on_host,
    "velocity_update": update_on_host,
    "guided_update": guided_on_host,
    "group_norm_silu": group_norm_on_host,
}


def check(name: str, args: Any, dtype: torch.dtype, any_shape: bool = False) -> None:
    floor = torch.finfo(dtype).eps * (
        2 if dtype == torch.float32 else 0.25
    )  # a sum in one sequence, where torch's is in pairs
    assert_errs_as_torch(tensors(HOST[name](*args)), OPS[name].reference, args, floor, any_shape)


def test_every_operation_with_a_cuda_backend_is_checked_here():
    assert set(HOST) == {name for name, op in OPS.items() if "cuda" in op.backends}


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HOST)
def test_the_arithmetic_is_the_references(name, dtype):
    taken = 0
    for args in OPS[name].example(lambda *shape: torch.randn(*shape).to(dtype)):
        backend = OPS[name].backends["cuda"]
        if backend.unsupported(*OPS[name]._positional(args, {})) is None:
            check(name, args, dtype)
            taken += 1
    assert taken >= 2


sizes = settings(max_examples=30)


def shifted(t: Tensor) -> Tensor:
    """The same values, one element off the alignment of the allocator."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


@built
@sizes
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    vectors=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    odd=st.booleans(),
)
def test_adaln_of_any_shape_and_alignment(B, T, vectors, dtype, odd):
    D = vectors * 16 // dtype.itemsize
    modulations = torch.randn(B, 6 * D).to(dtype).chunk(6, dim=1)
    x, y = (torch.randn(B, T, D).to(dtype) for _ in range(2))
    if odd:
        x, y = shifted(x), shifted(y)
    check("adaln_modulate", (x, *modulations[:2]), dtype, any_shape=True)
    check("gated_residual_adaln", (x, y, *modulations[2:5]), dtype, any_shape=True)


@built
@sizes
@given(
    N=st.integers(1, 3),
    C=st.integers(1, 4),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    data=st.data(),
)
def test_guided_update_of_any_shape_and_alignment(N, C, H, W, data):
    dtype, raw_dtype = data.draw(
        st.sampled_from([(a, b) for a in DTYPES for b in DTYPES if a in (torch.float32, b)])
    )
    guided, base, odd, count = (
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 4)),
    )
    R = 2 * N if guided else N
    x, raw = torch.randn(N, C, H, W).to(dtype), torch.randn(R, C, H, W).to(raw_dtype)
    if odd:
        x, raw = shifted(x), shifted(raw)
    others = [torch.randn(N, C, H, W).to(dtype) for _ in range(count)]
    scale = data.draw(st.sampled_from([2.5, torch.rand(N, 1, 1, 1)])) if guided else None
    args = (
        x,
        raw,
        scale,
        data.draw(st.integers(1, C)),
        0.3,
        torch.randn(R, C, H, W).to(dtype) if base else None,
    )
    check("guided_update", (*args, others, [0.1 * k - 0.2 for k in range(count)]), dtype)


@built
@sizes
@given(
    N=st.integers(1, 2),
    groups=st.sampled_from([1, 4, 8, 12]),
    size=st.sampled_from([1, 2, 3, 4, 8, 16]),
    H=st.integers(1, 40),
    W=st.integers(1, 20),
)
def test_group_norm_of_any_shape_far_from_zero(N, groups, size, H, W):
    assume(groups * size % 4 == 0)
    assume(size * H * W > 1)  # of one number there is no deviation, and torch refuses
    x = (torch.randn(N, groups * size, H, W) + 100).contiguous(memory_format=torch.channels_last)
    truth = group_norm.group_norm_silu.reference(
        x.double(), *(torch.ones(groups * size).double() for _ in range(2)), groups
    )
    got = group_norm_on_host(x, torch.ones(groups * size), torch.ones(groups * size), groups)
    assert_close(
        got, truth, 3e-4
    )  # 3e-6 of the offset, as sums of thousands of it round; a sum of squares would lose 1e-3


@built
def test_x_may_be_updated_in_place():
    x, raw = torch.randn(3, 4, 8, 8), torch.randn(6, 4, 8, 8)
    expected = OPS["guided_update"].reference(x, raw, 1.5, 3, 0.1)[0]
    guided_on_host(x, raw, 1.5, 3, 0.1, out=x)
    assert_close(x, expected, 1e-7)


@built
def test_wrong_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="no kernel is called flowturbo::nothing"):
        extension.launch("flowturbo::nothing", [1], 32, 0, b"", 0, False)
    name = "flowturbo::adaln<float,4,3,false>"
    with pytest.raises(
        ValueError, match=re.escape(name) + ": its arguments take [0-9]+ bytes, got 3"
    ):
        extension.run_on_host(name, b"abc")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to launch on")
def test_a_launch_that_fails_names_its_kernel():
    x, s = torch.randn(1, 2, 8), torch.randn(1, 8)
    call = adaln.cuda_call(x, None, None, s, s, None, torch.empty_like(x), 1e-6)
    name, grid, threads, args = call
    with pytest.raises(RuntimeError, match=re.escape(name)):
        extension.launch(name, grid, threads, 0, bytes(args), 0, False)


@built
def test_every_instance_that_calls_choose_exists():
    """Over widths: a name that csrc does not hold would fail only on a GPU."""
    names = set(extension.names())
    for dtype in DTYPES:
        V = 16 // dtype.itemsize
        for D in range(V, 1152 + V, V):
            x, s = torch.empty(1, 1, D, dtype=dtype), torch.empty(1, D, dtype=dtype)
            for y, gate in ((None, None), (x, s)):
                name, _, _, _ = adaln.cuda_call(x, y, gate, s, s, y, x, 1e-6)
                assert name in names
                items = int(name.split(",")[2])
                assert 32 * V * items >= D
        for C, groups in ((V, 1), (V, V), (96, 32), (128, 32), (256, 32), (512, 32), (1024, 2)):
            x = torch.empty(1, C, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
            w, buffers = torch.empty(C, dtype=dtype), group_norm.cuda_buffers(x, groups)
            calls = group_norm.cuda_calls(x, w, w, groups, 1e-6, *buffers, x)
            assert {name for name, *_ in calls} <= names


def test_architectures_that_a_build_serves():
    assert _cuda.runs_on(["80", "90a"], (9, 0))
    assert _cuda.runs_on(["80"], (8, 9))
    assert not _cuda.runs_on(["90a"], (9, 3))
    assert not _cuda.runs_on(["86"], (8, 0))
    assert not _cuda.runs_on(["80", "90a", "100a"], (12, 0))


def test_cuda_on_cpu_tensors_is_refused_by_name():
    with (
        use_backend("cuda"),
        pytest.raises(
            BackendError, match="adaln_modulate: cuda was asked for, but: tensors are on the cpu"
        ),
    ):
        OPS["adaln_modulate"](torch.randn(1, 2, 8), torch.randn(1, 8), torch.randn(1, 8))
    assert velocity_update(torch.ones(2, 2), [torch.ones(2, 2)], [1.0]).eq(2).all()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_no_kernel_spills(arch, tmp_path):
    """ptxas tells registers and spills of every instance."""
    for source in sorted(_nvrtc.sources().glob("*.cu")):
        command = [
            "nvcc",
            "-std=c++17",
            f"-arch=sm_{arch}",
            "-cubin",
            "-Xptxas",
            "-v",
            '-DFLOWTURBO_ARCHS=""',
            "-o",
            tmp_path / "x",
        ]
        process = subprocess.run([*command, source], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        spills = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            process.stderr,
        )
        assert all(stores == loads == "0" for _, stores, loads in spills), process.stderr


@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100a"])
def test_the_sources_compile_with_nvrtc(arch):
    """As CuPy compiles them at first use where there is no extension; this needs no GPU."""
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc
    for name in (
        "flowturbo::adaln<bfloat16,8,5,true>",
        "flowturbo::velocity_update<float,bfloat16,4>",
        "flowturbo::group_norm_statistics<half,8,8>",
        "flowturbo::group_norm_merge<bfloat16>",
        "flowturbo::group_norm_apply<float,4>",
    ):
        program = nvrtc.createProgram(_nvrtc.source(name), "source.cu", [], [])
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [*_nvrtc.options(), f"-arch=sm_{arch}"])
        except nvrtc.NVRTCError:
            raise AssertionError(nvrtc.getProgramLog(program)) from None
        assert nvrtc.getCUBIN(program)[:4] == b"\x7fELF"
        assert nvrtc.getLoweredName(program, name).startswith("_ZN9flowturbo")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_every_instance_belongs_to_a_file():
    """Of the names that the extension holds, so that NVRTC finds each one's source."""
    for name in extension.names() if extension else ():
        kernel = name.split("::")[1].split("<")[0]
        defined = rf"__global__ void (__launch_bounds__\(.*\) )?{kernel}\("
        assert re.search(defined, _nvrtc.source(name)), name
