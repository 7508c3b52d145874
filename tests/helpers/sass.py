"""Machine code of NVIDIA's GPUs as text: what a kernel loads before it waits for the first number,
and whether it waits for the kernels before it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


def disassembler() -> str | None:
    """nvdisasm, of a toolkit or of Triton."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(f) for f in (spec.submodule_search_locations if spec else None) or ()]
    paths = [str(f / "backends" / "nvidia" / "bin" / "nvdisasm") for f in folders]
    return next(filter(None, map(shutil.which, ("nvdisasm", *paths))), None)


def instructions(cubin: Path) -> dict[str, list[str]]:
    """Of each kernel in a file of machine code, by its linker's name."""
    command = [str(disassembler()), str(cubin)]
    text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    return {
        name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body)
        for name, body in re.findall(r"\n\.text\.(\w+):(.*?)(?=\n\.text\.|\Z)", text, re.DOTALL)
    }


def wide_loads(code: list[str]) -> int:
    """Loads of 16 bytes ahead of the first instruction that reads what one of them loads."""
    pending: set[int] = set()
    loads = 0
    for line in code:
        operation = re.sub(r"^@\S+ ", "", line)
        _, _, sources = operation.partition(",")
        if operation.startswith(("ST", "ATOM", "RED")):
            sources = operation
        if pending & read(sources):
            return loads
        if re.match(r"LDG\.E\S*\.128", operation):
            first = int(re.search(r"\bR(\d+)", operation)[1])  # type: ignore[index]
            pending |= set(range(first, first + 4))
            loads += 1
    return loads


def read(operands: str) -> set[int]:
    """Registers named there; an address is a pair."""
    return {
        int(number) + k
        for number, pair in re.findall(r"\bR(\d+)(\.64)?", operands)
        for k in ((0, 1) if pair else (0,))
    }


def waits_first(code: list[str]) -> bool:
    """Whether the kernel waits for those before it ahead of all its accesses to global memory."""
    names = [re.sub(r"^@\S+ ", "", line).split(".")[0].split()[0] for line in code]
    access = next(
        (i for i, n in enumerate(names) if re.match(r"(LD|ST|ATOM|RED)G?$", n)), len(code)
    )
    return "ACQBULK" in names[:access]
