"""csrc's machine code: loads that are under way at once, registers, local memory, the wait for the
kernels before; and its grids at the sizes of published models.
"""

from __future__ import annotations

import functools
import shutil
import subprocess

import machine_code_table
import pytest
import sass
import torch
from csrc_code import compiled

from flowturbo_kernels import OPS, _cuda, sizes

LOADS = {
    # 16-byte loads ahead of the first use: all of x, y, gate, shift and scale, at SiT-XL's width
    "adaln<bfloat16,8,5,true>": 25,
    "adaln<bfloat16,8,5,false>": 15,
    "adaln<half,8,5,true>": 25,
    "adaln<float,4,9,true>": 27,  # x, y and gate
    "adaln<float,4,9,false>": 9,
    # a tile, and then gains and offsets
    "group_norm_statistics<bfloat16,8,8>": 8,
    "group_norm_statistics<bfloat16,8,4>": 8,
    "group_norm_statistics<float,4,4>": 8,
    "group_norm_apply<bfloat16,8>": 12,
    "group_norm_apply<float,4>": 10,
    # x, four velocities, and two halves each of raw and base; raw of 16 bits beside float32 takes 8
    "velocity_update<bfloat16,bfloat16,8>": 9,
    "velocity_update<float,float,4>": 9,
    "velocity_update<float,bfloat16,4>": 7,
}
BLOCKS = {"adaln": 3, "group_norm": 3, "velocity": 8}
"""Of a multiprocessor, for which registers must suffice."""


machine_code = pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.disassembler() is None, reason="no nvcc or no nvdisasm"
)


@machine_code
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_loads_are_under_way_together(arch):
    code, _ = compiled(arch)
    assert {name: sass.wide_loads(code[name]) for name in LOADS} == LOADS


@machine_code
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_nothing_goes_to_local_memory_and_blocks_fit(arch):
    _, resources = compiled(arch)
    assert len(resources) == 42
    for name, (registers, stack) in resources.items():
        assert stack == 0, name
        threads = {"a": 128, "g": 256, "v": 64}[name[0]]
        blocks = next(n for kernel, n in BLOCKS.items() if name.startswith(kernel))
        assert -(-registers // 8) * 8 * threads * blocks <= 65536, (name, registers)


@machine_code
@pytest.mark.slow
def test_every_kernel_waits_for_those_before_it_where_it_can_be_launched_early():
    for arch in ("90a", "100a"):
        code, _ = compiled(arch)
        assert all(sass.waits_first(lines) for lines in code.values())
    assert not any("ACQBULK" in line for lines in compiled("80")[0].values() for line in lines)


@machine_code
@pytest.mark.slow
def test_the_page_of_machine_code_is_of_these_kernels():
    page = machine_code_table.PAGE.read_text()
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if "release 13.0" in said:  # another compiler, other registers
        assert machine_code_table.csrc_table() in page


def test_the_count_of_loads_ends_at_the_first_use():
    code = [
        "ACQBULK",
        "@!P1 LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]",
        "LDG.E R12, desc[UR4][R2.64+0x20]",
        "FADD R20, R21, R22",
        "@P0 STG.E.128 desc[UR4][R30.64], R8",
        "LDG.E.128 R16, desc[UR4][R2.64]",
    ]
    assert sass.wide_loads(code) == 2
    assert sass.wide_loads([*code[:5], "FADD R1, R21, R7", code[6]]) == 2
    assert sass.wide_loads([*code[:5], code[6]]) == 3
    assert sass.waits_first(code)
    assert not sass.waits_first(code[1:])
    assert not sass.waits_first([*code[1:], "ACQBULK"])


# Grids


@pytest.fixture
def blocks(monkeypatch) -> dict[str, list[int]]:
    """Of launches, by kernel, in place of them."""
    seen: dict[str, list[int]] = {}

    def launch(name, grid, threads, shared, args):
        kernel = name.split("::")[1].split("<")[0]
        seen.setdefault(kernel, []).append(functools.reduce(int.__mul__, grid))

    monkeypatch.setattr(_cuda, "launch", launch)
    return seen


def run(walk) -> None:
    for name, args in walk:
        if "cuda" in OPS[name].backends:
            OPS[name].backends["cuda"].run(*OPS[name]._positional(args, {}))


def make(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("batch, adaln, update", [(1, 128, 8), (8, 256, 64), (32, 512, 256)])
def test_blocks_of_a_call_of_sit_xl(batch, adaln, update, blocks):
    run(sizes.sit(make, batch))
    assert blocks == {"adaln": [adaln, adaln], "velocity_update": [update, update]}


@pytest.mark.parametrize("batch, tiles", [
    (1, [128, 512, 1024, 512]),
    (8, [256, 4096, 8192, 4096]),
])  # fmt: skip
def test_blocks_of_the_decoders_norms(batch, tiles, blocks):
    """Of 32 x 32 latents: 512 channels at 32 and 128 pixels a side, 256 and 128 channels at 256."""
    run(sizes.vae(make, batch))
    assert blocks["group_norm_statistics"] == blocks["group_norm_apply"] == tiles
    assert blocks["group_norm_merge"] == [32 * batch] * 4
