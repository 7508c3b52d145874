"""csrc's machine code, compiled by nvcc."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import sass

from flowturbo_kernels import _nvrtc

FILES = {"adaln.cu", "group_norm_silu.cu", "velocity_update.cu"}


@functools.cache
def compiled(arch: str) -> tuple[dict[str, list[str]], dict[str, tuple[int, int]]]:
    """(instructions, registers and bytes of local memory) of every kernel by csrc's name, with
    bfloat16 and half as C++ spells them.
    """
    code: dict[str, list[str]] = {}
    resources: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(FILES):
            cubin = Path(folder) / f"{file}.cubin"
            how = "-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"
            command = ["nvcc", *how, "-o", cubin, _nvrtc.sources() / file]
            said = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stderr
            code |= {named(name): lines for name, lines in sass.instructions(cubin).items()}
            for name, rest in re.findall(
                r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL
            ):
                stack = re.search(r"(\d+) bytes stack frame", rest)
                used = re.search(r"Used (\d+) registers", rest)
                assert stack
                assert used
                resources[named(name)] = int(used[1]), int(stack[1])
    return code, resources


def named(linkers: str) -> str:
    """adaln<bfloat16,8,5,true> of _ZN9flowturbo5adalnI13__nv_bfloat16Li8ELi5ELb1EEEvNS_5AdaLNE."""
    found = re.fullmatch(r"_ZN9flowturbo\d+([a-z_]+)I(.*)EEvNS_.*", linkers)
    assert found, linkers
    types = {"13__nv_bfloat16": "bfloat16", "6__half": "half", "f": "float", "Lb1": "true"}
    types |= {"Lb0": "false", "S1_": "bfloat16" if "bfloat16" in linkers else "half"}
    parts = re.findall(r"13__nv_bfloat16|6__half|S1_|f|Li\d+E|Lb[01]", found[2])
    return f"{found[1]}<{','.join(types.get(p) or p[2:-1] for p in parts)}>"
