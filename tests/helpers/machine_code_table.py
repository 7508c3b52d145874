"""The table in docs/machine-code.md: what the compiled kernels look like at real models' sizes.

python tests/helpers/machine_code_table.py > docs/machine-code.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import csrc_code
import sass

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "machine-code.md"
HEAD = """# Machine code

What compilers make of the kernels for Hopper (sm_90a), in bfloat16, at the sizes of SiT-XL/2 and of
Stable Diffusion's decoder. It says what can be known without a GPU: nothing here is a time. Tests
compile the kernels again, allow no local memory, and products by no other than these instructions.

- tile: what one program works on. Of several tiles the fastest is measured.
- registers: of a thread, the most at any size.
- blocks: how many a multiprocessor holds at once, the fewest at any size.
- loads: of 16 bytes, under way at once in a thread before it uses the first, the fewest at any
  size; or copies to shared memory, which run ahead by as many stages as the tile says.
- instruction: of the matrix products. HGMMA is Hopper's wgmma for 16 bits, QGMMA for fp8; HMMA is
  that of all generations.

Every kernel waits for those before it ahead of its first access to memory (programmatic dependent
launch).

## Triton

Compiled by Triton {version}.

"""
CSRC = """
## csrc

Compiled by nvcc 13.0.

"""
LIBRARIES = """
## Other packages

Candidates where the extra `hopper` is installed: quack-kernels 0.6.5 and flash-attn-4 4.0.0b36,
compiled by CuTe DSL 4.8.1. All load and store by TMA. `tests/kernels/test_quack_compiled.py`
compiles them again where they are installed.

| kernel | tile | registers | instruction |
|---|---|--:|---|
| quack, bias or bias + GELU | 128x144 | 168 | HGMMA 64x144x16 |
| | 64x144 | 232 | HGMMA 64x144x16 |
| | 256x144; 128x144 ping-pong | 168 | HGMMA 64x144x16 |
| quack, parts of K | 128x144 split 2, 4 | 168 | HGMMA 64x144x16 |
| | 64x144 split 2 | 232 | HGMMA 64x144x16 |
| quack, gated residual | 128x144, also split 2, 4; 256x144; ping-pong | 168 | HGMMA 64x144x16 |
| | 64x144 split 2 | 232 | HGMMA 64x144x16 |
| quack, fp8, 4 epilogues | 128x144; 256x144; ping-pong | 168 | QGMMA 64x144x32 |
| | 64x144 | 232 | QGMMA 64x144x32 |
| FlashAttention-4, head_dim 72 | 128x128 | 168 | HGMMA 64x128x16, 64x80x16 |
"""
COLUMNS = "kernel", "tile", "warps", "registers", "shared, KB", "blocks", "loads", "instruction"


def compiled() -> list[dict[str, Any]]:
    """What tests/helpers/aot.py reports for sm_90, of the sizes of real models, in bfloat16."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "90", "real"]
    out = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    ).stdout
    return [json.loads(line) for line in out.splitlines()]


def table(kernels: Iterable[dict[str, Any]]) -> str:
    """One row for each kernel and tile."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for k in kernels:
        if k["real"] and k["dtype"] == "bfloat16" and k["arch"] == 90:
            stages = k["options"].get("num_stages")
            tile = ", ".join(f"{name} {size}" for name, size in k["tile"].items())
            rows[k["kernel"], tile + (f", {stages} stages" if stages else "")].append(k)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "--:|" * 4 + "---|---|"]
    for (name, tile), group in sorted(rows.items()):
        code = [k["code"] for k in group]
        fewest = min(c["in_flight"] for c in code)
        loads = [f"{fewest} to registers"] * bool(fewest)
        loads += ["ahead, to shared memory"] * any(c["asynchronous"] for c in code)
        loads += ["TMA"] * any(c["tma"] for c in code)
        cells = (
            f"`{name}`",
            tile,
            group[0]["threads"] // 32,
            max(c["registers"] for c in code),
            round(max(k["shared"] for k in group) / 1024, 1),
            min(c["blocks"] for c in code),
            ", ".join(loads),
            ", ".join(sorted({p for c in code for p in c["products"]})),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def csrc_table() -> str:
    """One row for each kernel; those of half are those of bfloat16."""
    code, used = csrc_code.compiled("90a")
    lines = ["| kernel | registers | loads |", "|---|--:|--:|"]
    lines += [
        f"| `{name}` | {used[name][0]} | {sass.wide_loads(code[name])} |"
        for name in sorted(code)
        if "half" not in name
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import triton

    page = HEAD.format(version=triton.__version__) + table(compiled()) + CSRC + csrc_table()
    print(page + LIBRARIES, end="")
