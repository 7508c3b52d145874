"""The kernels of quack and FlashAttention-4 that are candidates at SiT-XL's sizes, compiled for
sm_90a on a machine that may have no GPU. CONTRIBUTING.md says how to install both beside a CPU
build of torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("quack", "flash_attn", "triton")),
        reason="needs the extra hopper",
    ),
]


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    """What tests/helpers/quack_aot.py reports."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "quack_aot.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def shapes(kernel: dict[str, Any]) -> list[str]:
    """The tensor cores' instructions that it is meant to use."""
    name = kernel["kernel"]
    if name.startswith("attention"):
        return ["64x128x16", "64x80x16"]  # 128 keys; 72 numbers a head, in steps of 16
    return ["64x144x32"] if name.startswith("fp8") else ["64x144x16"]


def test_every_tile_and_epilogue_is_compiled(kernels):
    names = [kernel["kernel"] for kernel in kernels]
    for operation in ("qkv", "fc1", "fc2", "fp8 qkv", "fp8 fc1", "fp8 fc1 to fp8", "fp8 to fp8"):
        for size, tile in (
            (512, "128x144"), (512, "64x144"), (4096, "256x144"), (4096, "128x144 ping-pong")
        ):  # fmt: skip
            assert f"{operation} {size} quack {tile}" in names
    for operation in ("proj", "fc2", "fp8 fc2"):
        for split in ("128x144 split 2", "128x144 split 4", "64x144 split 2"):
            assert f"{operation} 512 quack {split}" in names
    assert any(name.startswith("attention") for name in names)


def test_instructions_are_of_the_shape_meant(kernels):
    assert [(k["kernel"], k["shapes"]) for k in kernels if k["shapes"] != shapes(k)] == []


def test_operands_come_by_tma_and_results_leave_by_it(kernels):
    assert [k["kernel"] for k in kernels if not (k["tma_loads"] and k["tma_stores"])] == []


def test_nothing_is_spilled(kernels):
    spilled = [k["kernel"] for k in kernels if k["local_accesses"] or k["stack"] or k["local"]]
    assert spilled == []


def test_products_take_part_in_programmatic_dependent_launch(kernels):
    without = [k["kernel"] for k in kernels if not k["waits_for_the_kernel_before"]]
    assert {name.split()[0] for name in without} <= {"attention"}


def test_a_static_scale_costs_one_reciprocal_for_32_columns(kernels):
    """Of a thread: a tile of 144 columns leaves in five pieces."""
    counts = {k["kernel"]: k["reciprocals"] for k in kernels if "to fp8" in k["kernel"]}
    assert {name: n for name, n in counts.items() if not 1 <= n <= 5} == {}
