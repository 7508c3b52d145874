"""Compiles every kernel launch of every operation ahead of time, without a GPU; prints a JSON line
a compiled kernel.

A process of its own, because Triton's interpreter, which other tests turn on, must be off: python
tests/helpers/aot.py ARCH... [real]

With "real" only in bfloat16, at the sizes of real models.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import machine_code
import torch
import triton
from launch_limits import largest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowturbo_kernels import OPS, _op, _triton, _tune, sizes, use_backend

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.uint8: "u8",
}
WIDE = (
    r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64"
    r"|cp\.async\.c[ag]\.shared\.global[^;]*, 0x10"
)
"""Loads of 16 bytes."""
MADE_OF_OTHERS = "attention_branch_fp8", "branch_end_fp8"
"""Operations that run others, whose kernels are compiled for those."""


def launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(operation, of which sizes, kernel, arguments, options) on tensors without memory: of "real"
    models, at the "limits" that kernels state, and of "examples".
    """
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    _triton.Kernel.launch = lambda kernel, grid, *args, **options: seen.append(
        (kernel, args, options)
    )  # type: ignore[method-assign]
    _op.unavailable = lambda backend, device: None  # type: ignore[assignment]

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    real = itertools.chain(
        sizes.sit(make, 1),
        sizes.sit(make, 8),
        sizes.sit(make, 2, side=64),
        sizes.sit_fp8(make, 8),
        sizes.vae(make, 2),
    )
    examples = ((name, args) for name, op in OPS.items() for args in op.example(make))
    walks = ("real", every, real), ("limits", every, largest(make)), ("examples", first, examples)
    for kind, choose, (name, args) in ((*which, case) for *which, walk in walks for case in walk):
        _tune.fastest = choose  # type: ignore[assignment]
        if name in MADE_OF_OTHERS:
            continue
        positional = OPS[name]._positional(args, {})
        if (
            "triton" in OPS[name].backends
            and OPS[name].backends["triton"].unsupported(*positional) is None
        ):
            with use_backend("triton"):
                OPS[name](*args)
        yield from ((name, kind, *launch) for launch in seen)
        seen.clear()


def first(candidates: _tune.Candidates) -> str:
    return next(iter(candidates.functions))


def every(candidates: _tune.Candidates) -> str:
    """In place of the choice: run all candidates, so that all are recorded."""
    for run in candidates.functions.values():
        run(*candidates.cold)
    return next(iter(candidates.functions))


def source(kernel: Any, args: tuple[Any, ...], pdl: bool) -> tuple[str, ASTSource]:
    """(what tells it from others, the kernel specialised as a launch with these arguments would).

    pdl: whether with programmatic dependent launch, where the kernel takes part in it.
    """
    if kernel.in_turn:
        args = (*args, _triton.pdl_options(pdl)["PDL"])
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for i, (parameter, value) in enumerate(
        zip(inspect.signature(kernel.function).parameters.values(), args, strict=True)
    ):
        kind, aligned = described(value)
        if "constexpr" in str(parameter.annotation) or (kind == "i32" and value == 1):
            kind, constexprs[i,] = "constexpr", value
        elif aligned:
            attrs[i,] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    return str((kernel.__name__, signature, constexprs, attrs)), ASTSource(
        kernel.jit, signature, constexprs, attrs
    )


def described(value: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], True
    if type(value).__name__ == "TensorDescriptor":
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    return "constexpr", False


def tile(kernel: Any, args: tuple[Any, ...]) -> dict[str, int]:
    """The constants that say what one program works on."""
    return {
        name.removeprefix("BLOCK_").lower(): value
        for name, value in zip(inspect.signature(kernel.function).parameters, args, strict=False)
        if name.startswith(("BLOCK", "SPLIT", "MAIN", "PIXELS"))
    }


def waits_first(ptx: str) -> bool:
    """Whether a kernel waits for those before it ahead of all its accesses to global memory."""
    wait = ptx.find("griddepcontrol.wait")
    access = re.search(r"\b(ld|st|atom|red)\.global|cp\.async\.c[ag]|cp\.async\.bulk", ptx)
    return 0 <= wait < (access.start() if access else len(ptx))


def before_barriers(ptx: str) -> str:
    """What no thread waits in: loads there are all under way before a first number is used."""
    return re.split(r"\bbar(?:rier)?\.sync", ptx)[0]


def in_depth(cubin: bytes, registers: int, threads: int, shared: int) -> dict[str, Any]:
    """What the machine code says, and how many such blocks a multiprocessor holds."""
    code = machine_code.read(cubin, registers)
    return {"code": code._asdict() | {"blocks": code.blocks(threads, shared)}}


def main(archs: list[int], real_only: bool) -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    done = set()
    for dtype in (torch.bfloat16,) if real_only else (torch.bfloat16, torch.float32):
        for name, sizes_of, kernel, args, options in launches(dtype):
            if real_only and sizes_of != "real":
                break
            for arch in archs:
                pdl = kernel.in_turn and arch >= 90
                key, src = source(kernel, args, pdl)
                if (arch, key, str(options)) in done:
                    continue
                done.add((arch, key, str(options)))
                if arch < 89 and re.search("fp8|quantize", name):
                    continue  # no e4m3 there, as the operations say
                compiled = triton.compile(
                    src,
                    target=GPUTarget("cuda", arch, 32),
                    options=options | ({"launch_pdl": True} if pdl else {}),
                )
                ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
                threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
                used = machine_code.resources(cubin)
                print(
                    json.dumps(
                        {
                            "op": name,
                            "sizes": sizes_of,
                            "real": sizes_of == "real",
                            "kernel": kernel.__name__,
                            "dtype": str(dtype).removeprefix("torch."),
                            "arch": arch,
                            "constants": [v for v in args if isinstance(v, int | str)][-12:],
                            "options": options,
                            "tile": tile(kernel, args),
                            "threads": threads,
                            "shared": shared,
                            **used,
                            **(
                                in_depth(cubin, used["reg"], threads, shared)
                                if arch == 90 and sizes_of == "real"
                                else {}
                            ),
                            "fp8_product": src.signature.get("weight") == "*fp8e4nv",
                            "wgmma": "wgmma.mma_async" in ptx,
                            "shapes": sorted(set(re.findall(r"m64n\d+k\d+\.f32\.\w+\.\w+", ptx))),
                            "mma": "mma.sync" in ptx,
                            "waits_first": waits_first(ptx),
                            "wide_loads": len(re.findall(WIDE, ptx)),
                            "wide_loads_first": len(re.findall(WIDE, before_barriers(ptx))),
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:] if arch != "real"], "real" in sys.argv)
