"""What a kernel's machine code says: instructions of matrix products, loads in flight, registers,
local memory, blocks that fit a multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from launch_limits import REGISTERS, SHARED, registers

_THREADS, _BLOCKS, _RESERVED = 2048, 32, 1024
"""Of a multiprocessor of sm_90: threads and blocks at most, and bytes of shared memory that each
block takes besides its own.
"""
_WIDTH = {"64": 2, "128": 4}
_WRITES_NOTHING = ("ST", "RED", "BRA", "EXIT", "BAR", "UTMA", "SYNCS", "WARPSYNC", "DEPBAR")


class Instruction(NamedTuple):
    """name: with its modifiers, as LDG.E.128. writes, reads: numbers of registers."""

    name: str
    writes: frozenset[int]
    reads: frozenset[int]


class MachineCode(NamedTuple):
    """registers: of a thread. local: bytes of a thread that spilled. products: the shapes of its
    matrix instructions. tma: its loads of whole tiles. in_flight: the most 16-byte loads to
    registers that are issued before a result of one is used. asynchronous: its 16-byte copies to
    shared memory. waits_first: whether it waits for the kernels before it ahead of all loads.
    """

    registers: int
    local: int
    products: tuple[str, ...]
    tma: int
    in_flight: int
    asynchronous: int
    waits_first: bool

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


def read(cubin: bytes) -> MachineCode:
    """The facts of a file with one kernel."""
    resources = _run("cuobjdump", cubin, "--dump-resource-usage")
    return facts(
        list(instructions(_run("nvdisasm", cubin, "-c"))),
        {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)},
    )


def facts(code: list[Instruction], resources: dict[str, int]) -> MachineCode:
    names = [instruction.name for instruction in code]
    wait = next((i for i, name in enumerate(names) if name == "ACQBULK"), len(names))
    load = next(
        (i for i, name in enumerate(names) if re.match(r"LDG|UTMALDG|UBLKCP|ATOM", name)),
        len(names),
    )
    shapes = [_product(name) for name in names if _product(name)]
    return MachineCode(
        resources["REG"],
        max(resources["STACK"], resources["LOCAL"]),
        tuple(sorted(set(shapes))),
        sum(name.startswith(("UTMALDG", "UBLKCP")) for name in names),
        in_flight(code),
        sum(name.startswith("LDGSTS") and ".128" in name for name in names),
        wait < load,
    )


def in_flight(code: list[Instruction]) -> int:
    """The most 16-byte loads to registers that are issued before a result of one is read."""
    most, pending, count = 0, set[int](), 0
    for instruction in code:
        if pending & instruction.reads:
            pending, count = set(), 0
        if instruction.name.startswith("LDG.") and ".128" in instruction.name:
            pending |= instruction.writes
            count += 1
            most = max(most, count)
    return most


def instructions(listing: str) -> Iterator[Instruction]:
    """Of nvdisasm's listing of one kernel, in order."""
    for line in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", listing, re.MULTILINE):
        text = re.sub(r"^@!?U?P\w+\s+", "", line)
        name, _, operands = text.partition(" ")
        first, _, rest = operands.partition(",")
        if name.startswith(_WRITES_NOTHING):
            first, rest = "", operands
        width = next((n for bits, n in _WIDTH.items() if bits in name.split(".")), 1)
        written = re.match(r"\s*R(\d+)\b", first)
        writes = range(int(written[1]), int(written[1]) + width) if written else ()
        reads = {
            int(r) + i
            for r, wide in re.findall(r"\bR(\d+)((?:\.reuse)?(?:\.64)?)", rest)
            for i in range(2 if ".64" in wide else 1)
        }
        yield Instruction(name, frozenset(writes), frozenset(reads))


def _product(name: str) -> str | None:
    """As "HGMMA 64x144x16", or None for other instructions."""
    match = re.match(r"([HQI]G?MMA)\.(\d+x\d+x\d+|\d{4,5})", name)
    return f"{match[1]} {match[2]}" if match else None


def _run(name: str, cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool(name), option, file.name], capture_output=True, text=True, check=True
        ).stdout
