"""Every launch that host code can ask for is one that a GPU can make: threads, registers, shared
memory, grids.

csrc's kernels for all widths, alignments and dtypes, with the registers that compilers give them;
all grids for inputs as large as `unsupported` lets through. Triton's blocks:
tests/kernels/test_compiled.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launch_limits import GRID, PLAIN_SHARED, REGISTERS, THREADS, registers
from ops import DTYPES, FP8
from torch import Tensor

from flowturbo_kernels import OPS, _cuda, _nvrtc, _triton

ARCHS = "80", "90a"


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """What csrc's host code asks for, in place of a launch."""
    seen: list[Launch] = []
    monkeypatch.setattr(
        _cuda,
        "launch",
        lambda name, grid, threads, shared, args: seen.append(Launch(name, grid, threads, shared)),
    )
    return seen


def make(dtype: torch.dtype, odd: bool) -> Any:
    """Tensors of no particular numbers, aligned or one element off."""
    return lambda *shape: torch.empty(torch.Size(shape).numel() + odd, dtype=dtype)[
        int(odd) :
    ].view(shape)


def adaln(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """All widths to 600, and from there to the largest some of every kind: whole vectors and not,
    and both sides of every limit.
    """
    for D in {
        *range(2, 600),
        *range(601, 16385, 61),
        *range(1024, 16385, 256),
        *range(1023, 16385, 1024),
        *range(14330, 14345),
    }:
        for odd in (False, True):
            new = make(dtype, odd)
            yield "adaln_modulate", (new(1, 1, D), new(1, D), new(1, D), 1e-6)
            yield (
                "gated_residual_adaln",
                (new(1, 1, D), new(1, 1, D), new(1, D), new(1, D), new(1, D), 1e-6),
            )


def group_norm(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for C in {
        *range(1, 300),
        *range(300, 9000, 37),
        *range(256, 9000, 256),
        1023,
        1025,
        1032,
        4095,
        4097,
        8191,
        8193,
    }:
        for groups in {1, C, *(g for g in (2, 32, 37, 1024) if C % g == 0)}:
            for odd in (False, True):
                x = torch.empty(C + odd, dtype=dtype)[int(odd) :].view(1, C, 1, 1)
                weight, bias = make(dtype, odd)(C), make(dtype, False)(C)
                yield (
                    "group_norm_silu",
                    (x.contiguous(memory_format=torch.channels_last), weight, bias, groups, 1e-6),
                )
    x, weight = make(dtype, False)(1, 8, 512, 512), make(dtype, False)(8)  # of many tiles
    yield (
        "group_norm_silu",
        (x.contiguous(memory_format=torch.channels_last), weight, weight, 8, 1e-6),
    )


def updates(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for C, HW in (
        (1, 1),
        (3, 1),
        (1, 31),
        (1, 33),
        (4, 64),
        (4, 65),
        (1, 255),
        (1, 257),
        (4, 2048),
        (3, 2049),
    ):
        for odd in (False, True):
            new = make(dtype, odd)
            x, v = new(1, C, HW, 1), new(2, C, HW, 1)
            yield "velocity_update", (x, [v] * 4, [0.1] * 4)
            yield "guided_update", (x, v, 1.5, C, 0.1, v, [v] * 4, [0.1] * 4)
            yield (
                "guided_update",
                (
                    x,
                    make(torch.float32, odd)(2, C, HW, 1).to(dtype),
                    1.5,
                    C,
                    0.1,
                    v,
                    [v] * 4,
                    [0.1] * 4,
                ),
            )
            if dtype != torch.float32:
                wide = make(torch.float32, odd)(1, C, HW, 1)
                yield "guided_update", (wide, v, 1.5, C, 0.1, None, [wide], [0.1])


WALKS = {"adaln": adaln, "group_norm": group_norm, "updates": updates}


def asked_for(walk: Any, launched: list[Launch]) -> list[tuple[Launch, str]]:
    """All launches of a walk over what the operations do not refuse, each with what asked for
    it.
    """
    requests = []
    for dtype in DTYPES:
        for name, args in walk(dtype):
            backend = OPS[name].backends["cuda"]
            if backend.unsupported(*args) is None:
                backend.run(*args)
            requests += [
                (
                    launch,
                    f"{name} {dtype} {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}",
                )
                for launch in launched
            ]
            launched.clear()
    return requests


def resources(said: str) -> dict[str, tuple[int, int]]:
    """What ptxas says, by linkers' names: registers of a thread, and a block's shared memory beside
    what its launch asks for.
    """
    resources_of = {}
    for name, rest in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL
    ):
        smem = re.search(r"(\d+) bytes smem", rest)
        resources_of[name] = (
            int(re.search(r"Used (\d+) registers", rest)[1]),
            int(smem[1]) if smem else 0,
        )
    return resources_of


def instances(names: set[str], arch: str, folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Of each instance what each compiler at hand gives it: NVRTC, which runs where there is no
    extension, and builds' nvcc.
    """
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc
    files = defaultdict(list)
    for name in sorted(names):
        files[_nvrtc.FILES[name.split("::")[1].split("<")[0]]].append(name)
    by_name = {}
    for file, members in files.items():
        path = _nvrtc.sources() / file
        program = nvrtc.createProgram(path.read_text(), file, [], [])
        for name in members:
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, [*_nvrtc.options(), f"-arch=sm_{arch}", "--ptxas-options=-v"])
        by_compiler = [resources(nvrtc.getProgramLog(program))]
        if nvcc := shutil.which("nvcc"):
            command = [
                nvcc,
                "-O3",
                "-std=c++17",
                "--expt-relaxed-constexpr",
                f"-arch=sm_{arch}",
                "-cubin",
                "-Xptxas",
                "-v",
            ]
            process = subprocess.run(
                [*command, "-o", folder / "x.cubin", path],
                check=True,
                capture_output=True,
                text=True,
            )
            by_compiler.append(resources(process.stderr))
        for name in members:
            by_name[name] = [known[nvrtc.getLoweredName(program, name)] for known in by_compiler]
        nvrtc.destroyProgram(program)
    return by_name


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS)
def test_every_block_of_csrc_fits_a_multiprocessor(walk, launched, tmp_path):
    requests = asked_for(WALKS[walk], launched)
    names = {launch.name for launch, _ in requests}
    for arch in ARCHS:
        known = instances(names, arch, tmp_path)
        for launch, what in requests:
            assert 1 <= launch.threads <= THREADS, (launch, what)
            for each, static in known[launch.name]:
                assert registers(each, launch.threads) <= REGISTERS, (arch, each, launch, what)
                assert static + launch.shared <= PLAIN_SHARED, (arch, launch, what)


def test_the_walks_reach_the_largest_blocks(launched):
    """Of every kernel: those that registers and shared memory must suffice for."""
    most: dict[str, int] = defaultdict(int)
    for walk in WALKS.values():
        for launch, _ in asked_for(walk, launched):
            kernel = launch.name.split("<")[0].removeprefix("flowturbo::")
            most[kernel] = max(most[kernel], launch.threads)
    assert dict(most) == {
        "adaln": 128, "group_norm_statistics": 256, "group_norm_merge": 256,
        "group_norm_apply": 256, "velocity_update": 64
    }  # fmt: skip


def test_registers_are_counted_by_whole_warps():
    assert registers(68, 1024) == 72 * 1024 > REGISTERS  # what adaLN asked for once
    assert registers(64, 1024) == REGISTERS
    assert registers(30, 33) == 2 * 32 * 32


# Grids


def empty(*shape: int) -> Tensor:
    """Of any size: without memory."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def huge() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(operation, arguments) whose grids would pass an axis, or with numbers that 32 bits can't
    count, and the last before that.
    """
    for rows in (2**31 - 1, 2**31):
        yield "adaln_modulate", (empty(rows, 1, 8), empty(rows, 8), empty(rows, 8))
        yield "gated_residual_adaln", (*[empty(1, rows, 8)] * 2, *[empty(1, 8)] * 3)
        yield "velocity_update", (empty(rows, 2), [empty(rows, 2)], [0.1])
        yield "adaln_quantized", (empty(rows, 1, 2), empty(rows, 2), empty(rows, 2))
        yield "gated_residual_adaln_quantized", (*[empty(1, rows, 2)] * 2, *[empty(1, 2)] * 3)
        yield "quantize_rows", (empty(rows, 8),)
        yield "quantize_static", (empty(rows), empty(1).float())
        weight = torch.empty(8, 8, dtype=torch.float8_e4m3fn, device="meta")
        layer = weight, empty(8).float(), empty(8)
        yield "linear_fp8", (empty(1, rows, 8), *layer)
        x = torch.empty(1, rows, 8, dtype=torch.float8_e4m3fn, device="meta")
        yield "linear_quantized", (x, None, *layer)
        yield "linear_quantized_residual", (x, None, *layer, empty(1, rows, 8), empty(1, 8))
        yield "branch_end_fp8", (x, *layer, empty(1, rows, 8), *[empty(1, 8)] * 3)
    for tokens in (2**30, 2**31):
        qkv = empty(1, tokens // 24, 3, 1, 8)
        yield "attention", (qkv,)
        yield "attention_quantized", (qkv, empty(1).float())
        ends = empty(1, tokens // 24, 8), *[empty(1, 8)] * 3
        yield "attention_branch_fp8", (qkv, empty(1).float(), *layer, None, *ends)
        yield "attention", (empty(1, tokens // 48, 2, 3, 1, 8)[:, :, 0],)
    for S in (65535, 65536):
        yield "conditions", (empty(1, 8), [0.5] * S, empty(8, 2), empty(8), empty(8, 8), empty(8))
    for N in (65535, 65536):
        x, v = empty(N, 1, 2, 2), empty(2 * N, 1, 2, 2)
        yield "velocity_update", (x, [v], [0.1])
        yield "guide", (v, 1.5, 1)
        yield "guided_update", (x, v, 1.5, 1, 0.1)
        yield "guided_update", (v[:N], x, None, 1, 0.1)
        yield "group_norm_silu", (empty(N, 8, 2, 2), empty(8), empty(8), 1)
        yield from decoding(x)
        yield "patch_embed", (x, empty(8, 1, 2, 2), empty(8))
        yield "patch_embed", (x[:1], empty(8, 2, 2, 2), empty(8), x)
        layer = empty(2 * N, 1, 8), empty(2 * N, 8), empty(2 * N, 8), empty(4, 8), empty(4)
        yield "final_update", (*layer, x, 1.5, 1, 0.1)
        yield "attention", (empty(N, 1, 3, 1, 8),)
        yield "linear", (empty(N, 8), empty(8, 8), empty(8))
        yield (
            "linear_gated_residual",
            (empty(N, 1, 8), empty(8, 8), empty(8), empty(N, 1, 8), empty(N, 8)),
        )
    for side in (2**15, 2**16):  # 2^30 and 2^32 numbers an image
        x = empty(1, 1, side, side)
        yield "velocity_update", (x, [x], [0.1])
        yield "guide", (empty(2, 1, side, side), 1.5, 1)
        yield "guided_update", (x, x, None, 1, 0.1)
        yield "group_norm_silu", (empty(1, 8, side, side), empty(8), empty(8), 1)
        yield from decoding(x)
        yield "patch_embed", (x, empty(8, 1, 2, 2), empty(8))
        layer = empty(1, side * side // 4, 8), empty(1, 8), empty(1, 8), empty(4, 8), empty(4)
        yield "final_update", (*layer, x, None, 1, 0.1)
    for D in (65535 * 32, 65535 * 32 + 1, 65535 * 64 + 1):
        yield "patch_embed", (empty(1, 1, 2, 2), empty(D, 1, 2, 2), empty(D))
    for channels in (1024, 4096, 8192, 2**21):
        yield "group_norm_silu", (empty(1, channels, 2, 2), empty(channels), empty(channels), 32)
        yield (
            "group_norm_silu",
            (empty(1, channels, 2, 2), empty(channels), empty(channels), channels),
        )


def decoding(x: Tensor) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What stands between a decoder's convolutions, on images of one channel."""
    one = empty(1)
    yield "shifted_group_norm", (x, one, one, one, 1)
    yield "shifted_sum", (x, one, x)
    yield "residual_group_norm", (x, one, x, one, one, one, 1)
    yield "double_pixels", (x[..., : x.shape[3] // 2],)
    four = x[:, :, : x.shape[2] // 4 + 2].expand(-1, 4, -1, -1)
    yield "interleaved_group_norm", (four, one, one, one, 1)
    yield "unscale_latents", (x, 0.5, 0.0, torch.bfloat16)
    yield "image_bytes", (x,)


def positional(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    OPS[name].check(*args)
    return OPS[name]._positional(args, {})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_grid_is_one_or_its_inputs_are_refused(backend, launched, monkeypatch):
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        _triton.Kernel, "launch", lambda kernel, grid, *args, **options: grids.append(grid)
    )
    taken: dict[str, list[bool]] = defaultdict(list)
    for name, args in huge():
        if backend not in OPS[name].backends:
            continue
        way, full = OPS[name].backends[backend], positional(name, args)
        reason = way.unsupported(*full)
        taken[name].append(reason is None)
        if reason is not None:
            assert re.search(r"at most \d+ .*, got \d+", reason), (name, reason)
            continue
        way.run(*full)
        for grid in (*grids, *(launch.grid for launch in launched)):
            sizes = [tuple(t.shape) for t in args if isinstance(t, Tensor)]
            assert all(1 <= n <= most for n, most in zip(grid, GRID, strict=False)), (
                name,
                grid,
                sizes,
            )
        grids.clear()
        launched.clear()
    assert all(any(ways) for ways in taken.values()), taken
    refused = {name for name, ways in taken.items() if not all(ways)}
    decoder = {name for name, _ in decoding(empty(1, 1, 2, 2))}
    in_triton_alone = {"attention", *FP8, *decoder} if backend == "triton" else set()
    assert (
        refused
        >= {"adaln_modulate", "gated_residual_adaln", "guided_update", "group_norm_silu"}
        | in_triton_alone
    )
