"""What a kernel's machine code says: instructions of matrix products, loads in flight, registers,
local memory, blocks that fit a multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import sass
from launch_limits import REGISTERS, SHARED, registers

_THREADS, _BLOCKS, _RESERVED = 2048, 32, 1024
"""Of a multiprocessor of sm_90: threads and blocks at most, and bytes of shared memory that each
block takes besides its own.
"""


class MachineCode(NamedTuple):
    """registers: of a thread. products: the shapes of its matrix instructions. tma: its loads of
    whole tiles. in_flight: the 16-byte loads to registers that are issued before a result of one is
    used. asynchronous: its 16-byte copies to shared memory.
    """

    registers: int
    products: tuple[str, ...]
    tma: int
    in_flight: int
    asynchronous: int

    def blocks(self, threads: int, shared: int) -> int:
        """How many such blocks a multiprocessor of sm_90 holds at once."""
        return min(
            _BLOCKS,
            _THREADS // threads,
            REGISTERS // registers(self.registers, threads),
            (SHARED[90] + _RESERVED) // (shared + _RESERVED),
        )


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm, as Triton brings it."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of a file's kernel: reg, stack, local."""
    with _file(cubin) as path:
        command = [tool("cuobjdump"), "--dump-resource-usage", path]
        said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    return {k.lower(): int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def read(cubin: bytes, each: int) -> MachineCode:
    """The facts of a file with one kernel, whose threads have so many registers each."""
    with _file(cubin) as path:
        (code,) = sass.instructions(path).values()
    return facts(code, each)


@contextmanager
def _file(cubin: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield Path(file.name)


def facts(code: list[str], each: int) -> MachineCode:
    names = [re.sub(r"^@\S+ ", "", line).split()[0] for line in code]
    return MachineCode(
        each,
        tuple(sorted({shape for name in names if (shape := _product(name))})),
        sum(name.startswith(("UTMALDG", "UBLKCP")) for name in names),
        sass.wide_loads(code),
        sum(name.startswith("LDGSTS") and ".128" in name for name in names),
    )


def _product(name: str) -> str | None:
    """As "HGMMA 64x144x16", or None for other instructions."""
    match = re.match(r"([HQI]G?MMA)\.(\d+x\d+x\d+|\d{4,5})", name)
    return f"{match[1]} {match[2]}" if match else None
