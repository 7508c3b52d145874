"""Every kernel launch of every operation, compiled for two generations of GPUs, on a machine that
may have neither.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import machine_code_table
import pytest
from launch_limits import REGISTERS, SHARED, THREADS, registers
from ops import FP8
from paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    """What tests/helpers/aot.py reports; one process an architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "aot.py")]
    running = [
        subprocess.Popen(
            [*command, str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in SHARED
    ]
    kernels = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        kernels += [json.loads(line) for line in out.splitlines()]
    return kernels


def test_every_operation_with_a_triton_kernel_is_compiled(kernels):
    from flowturbo_kernels import OPS

    fp8 = {(name, 80) for name in FP8}  # before sm_89 there is no e4m3
    expected = {
        (name, arch)
        for name, op in OPS.items()
        if "triton" in op.backends and name not in MADE_OF_OTHERS
        for arch in SHARED
    } - fp8
    assert {(k["op"], k["arch"]) for k in kernels} == expected
    assert {k["dtype"] for k in kernels} == {"bfloat16", "float32"}


def test_no_kernel_spills(kernels):
    """But at the limits of what kernels take, where no model is."""
    spilled = [k for k in kernels if (k["stack"] or k["local"]) and k["sizes"] != "limits"]
    assert [k for k in spilled if max(k["stack"], k["local"]) > allowed(k)] == []


def allowed(k: dict[str, Any]) -> int:
    """Bytes. Triton 3.9's assembler gives the sum of two float32 images, 128 channels wide, 64
    registers and six numbers in local memory, where Triton 3.6's gives it what it needs.
    """
    return 24 if (k["kernel"], k["dtype"], k["arch"]) == ("_add_kernel", "float32", 90) else 0


def test_every_block_fits_a_multiprocessor(kernels):
    """Or its launch would fail: threads, registers of all of them, shared memory."""
    assert {k["sizes"] for k in kernels} == {"real", "limits", "examples"}
    assert [k for k in kernels if not 32 <= k["threads"] <= THREADS] == []
    assert [k for k in kernels if registers(k["reg"], k["threads"]) > REGISTERS] == []
    assert [k for k in kernels if k["shared"] > SHARED[k["arch"]]] == []


def test_products_of_16_bits_run_on_tensor_cores(kernels):
    """wgmma, which needs 64 rows, where Hopper has it; no float32 product runs there, which would
    be TF32.
    """
    products = [k for k in kernels if k["kernel"] in PRODUCTS]
    assert {k["kernel"] for k in products} == set(PRODUCTS)
    for k in products:
        if k["fp8_product"]:
            assert k["wgmma"] or (k["mma"] and not k["real"]), k
            assert all(re.fullmatch(r"m64n\d+k32\.f32\.e4m3\.e4m3", s) for s in k["shapes"]), k
        elif k["dtype"] == "float32":
            assert not k["mma"], k
            assert not k["wgmma"], k
        elif k["arch"] == 90 and PRODUCTS[k["kernel"]] and k["real"]:
            assert k["wgmma"], k
        else:
            assert k["mma"] or k["wgmma"], k


def test_kernels_wait_for_those_before_them_where_launches_overlap(kernels):
    """Programmatic dependent launch exists from sm_90 on; before it, the wait would not compile."""
    assert [k for k in kernels if k["waits_first"] != (k["arch"] >= 90)] == []


def test_wgmma_is_of_the_shape_meant_at_the_sizes_of_real_models(kernels):
    """64 rows by a tile's columns (at most 256) by 32 bytes of K."""
    for k in kernels:
        if k["arch"] != 90 or k["kernel"] != "_product_kernel" or not k["real"]:
            continue
        if k["dtype"] == "float32" and not k["fp8_product"]:
            continue
        shapes = k["code"]["products"]
        kind, depth = ("QGMMA", 32) if k["fp8_product"] else ("HGMMA", 16)
        assert len(shapes) == 1, k
        name, shape = shapes[0].split()
        rows, columns, deep = map(int, shape.split("x"))
        assert (name, rows, deep) == (kind, 64, depth), k
        assert k["tile"]["n"] % columns == 0, k
        assert columns >= min(64, k["tile"]["n"]), k
        assert k["code"]["asynchronous"], k


def test_the_page_of_machine_code_is_of_these_kernels(kernels):
    import triton

    page = machine_code_table.PAGE.read_text()
    table = machine_code_table.table(kernels)
    if f"Triton {triton.__version__} makes" in page:  # another compiler, other registers
        assert table in page, f"{machine_code_table.PAGE.name} is to be made again:\n{table}"
    section = page[page.index("## Triton") : page.index("## csrc")]
    rows = [line.split("|")[1:3] for line in table.splitlines()]
    assert rows == [line.split("|")[1:3] for line in section.splitlines() if line[:1] == "|"]


MADE_OF_OTHERS = {"attention_branch_fp8", "branch_end_fp8"}
"""They run other operations; tests/helpers/aot.py leaves them out."""
PRODUCTS = {
    "_patch_kernel": False,
    "_final_kernel": False,
    "_attention_kernel": True,
    "_product_kernel": True,
}
"""Kernels that multiply matrices, and whether they must use wgmma: those with few rows or features
a program can't.
"""


@pytest.mark.parametrize(
    "name",
    [
        "_adaln_kernel",
        "_residual_adaln_kernel",
        "_adaln_quantized_kernel",
        "_quantize_static_kernel",
        "_guided_update_kernel",
        "_update_kernel",
        "_attention_kernel",
        "_product_kernel",
        "_sum_kernel",
        "_bytes_kernel",
    ],
)
def test_memory_bound_kernels_load_16_bytes_at_a_time(kernels, name):
    """At the sizes of real models."""
    real = [k for k in kernels if k["kernel"] == name and k["real"]]
    assert real
    assert all(k["wide_loads"] for k in real), real


@pytest.mark.parametrize(
    "name, tiles", [("_statistics_kernel", 1), ("_apply_kernel", 1), ("_add_kernel", 2)]
)
def test_a_tile_of_a_decoder_is_loaded_in_eight_loads_of_16_bytes(kernels, name, tiles):
    """All of them before the first barrier, across which an assembler moves none; those of a
    residual as well.
    """
    real = [k for k in kernels if k["kernel"] == name and k["real"]]
    assert real
    assert min(k["wide_loads_first"] for k in real) == 8, real
    assert max(k["wide_loads_first"] for k in real) == 8 * tiles, real
    assert all(k["reg"] <= 128 and k["threads"] == 256 for k in real), real  # two blocks at a time
