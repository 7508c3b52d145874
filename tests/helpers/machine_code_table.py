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

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "machine-code.md"
HEAD = """# Machine code

What Triton {version} makes of the kernels for sm_90a, in bfloat16, at the sizes of SiT-XL/2 and of
Stable Diffusion's decoder. It says what can be known without a GPU: nothing here is a time. A test
compiles them again, and allows no local memory, and products by no other than the instructions
named.

- tile: what one program works on. Where several tiles are listed, the fastest is measured.
- registers: of a thread, the most at any size. None spills.
- blocks: how many a multiprocessor holds at once, the fewest at any size.
- loads: 16-byte loads that are under way at once in a thread, the fewest at any size; or copies to
  shared memory, which run ahead of their use by the stages that are stated.
- instruction: of the matrix products. HGMMA is Hopper's wgmma for 16 bits, QGMMA for fp8, HMMA the
  instruction of all generations.

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
        text=True,
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
        loads = [f"{min(c['in_flight'] for c in code)} to registers"] * any(
            c["in_flight"] for c in code
        )
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


if __name__ == "__main__":
    import triton

    print(HEAD.format(version=triton.__version__) + table(compiled()), end="")
