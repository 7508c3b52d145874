"""bench/gpu_check.sh from end to end on the stand-in for a CUDA device: every part, shortened by
its own variables.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PARTS = ["correct", "kernels", "plans-8", "growth"]
SHORT = {
    "BATCHES": "8",
    "DECODER": "small",
    "DEPTH": "1",
    "GROWTH": "--batches 1 --counts 1 --sides 16 --repeats 1",
    "LIMITS": "1000",  # of two cores that others use as well
    "MODEL": "SiT-S/8",
    "OPS": "adaln or guide",
    "PLANS": "H1P1R1",
    "ROUNDS": "1",
    "TESTS": "cuda_backend and velocity and float32",
}
INDUCTOR = {
    "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN",
}
"""The stand-in loads no modules from files, and tiles take long to compile."""

TOOLS = {"compute-sanitizer": 'until [[ $1 == *python* ]]; do shift; done\nexec "$@"\n'}


def checkout(folder: Path) -> Path:
    """A copy, into which the extension may be built."""
    for name in ("bench", "csrc", "flowturbo", "flowturbo_kernels", "tests"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"),
        )
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def check(folder: Path, tools: dict[str, str], rivals: str) -> tuple[int, list[str]]:
    """All parts in a fresh copy -> the exit status and what was printed."""
    for name, text in tools.items():
        tool = folder / "tools" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\n{text}")
        tool.chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }
    environment |= {
        f"FLOWTURBO_BENCH_{name}": value for name, value in (SHORT | {"RIVALS": rivals}).items()
    } | INDUCTOR
    environment |= {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{folder / 'tools'}:{os.environ['PATH']}",
    }
    command = [
        "bash",
        str(checkout(folder / "checkout") / "bench/gpu_check.sh"),
        "all",
        str(folder / "results"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout.splitlines()


def test_all_parts(tmp_path):
    """On Hopper all pass; on Ampere without nvcc the kernels of csrc are CuPy's, and fp8 is not
    there.
    """
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    tools = TOOLS if hopper else TOOLS | {"nvcc": "exit 1\n"}
    rivals = "ours ours-fp8 eager autocast compile" if hopper else "ours ours-fp8 ours-eager eager"
    status, printed = check(tmp_path, tools, rivals)
    name = f"{torch.cuda.get_device_name()} (stand-in: no figure means anything)"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    results = tmp_path / "results"
    assert sorted(path.name for path in results.rglob("*")) == [
        "RESULTS.md",
        *(f"{slug}.{end}" for end in ("jsonl", "tar.gz", "txt")),
    ]
    summaries = (results / f"{slug}.txt").read_text().splitlines()
    assert printed[0] == summaries[0]
    by_part = {line.split(":")[0]: line for line in summaries}
    assert all(f" on {name}" in by_part[part] for part in PARTS)
    troubled = [] if hopper else ["correct", "kernels"]  # those that build
    assert [part for part in by_part if "NOT PASSED" in by_part[part]] == troubled, summaries
    assert status == (0 if hopper else 1)
    assert re.match(r"correct: [1-9]\d* passed, 0 failed", by_part["correct"])
    assert not re.match(r"kernels: 0 ", by_part["kernels"])
    assert re.match(
        r"plans-8: H1P1R1 256x256 batch 8 with decoding \(1 blocks, small decoder\) ours .*x eager",
        by_part["plans-8"],
    )

    page = (results / "RESULTS.md").read_text()
    assert page.count("\n## ") == page.count(f"\n## {name}\n") == 1
    assert ("ours-fp8, scaled products in fp8 need a GPU of sm_89 or later" in page) == (not hopper)
    lines = [json.loads(line) for line in (results / f"{slug}.jsonl").read_text().splitlines()]
    measured = {line["who"] for line in lines if "measured" in line}
    assert {"eager", "triton", "cuda", "auto", "compiled", *rivals.split()} - measured == (
        set() if hopper else {"ours-fp8"}
    )
    with tarfile.open(results / f"{slug}.tar.gz") as archive:
        inside = {Path(member).name for member in archive.getnames()}
    assert {
        "H1P1R1-batch8.trace.json",
        "H1P1R1-batch8.md",
        "growth.png",
        "correct-tests.log",
    } <= inside
