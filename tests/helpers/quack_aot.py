"""Compiles the kernels of quack and FlashAttention-4 that are candidates at SiT-XL's sizes, for
sm_90a, without a GPU; prints a JSON line a kernel, with what its machine code holds.

A process of its own, since the compilers read their settings at import:
python tests/helpers/quack_aot.py [WORD...], only kernels whose name holds one of the words.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(tempfile.mkdtemp())
os.environ.update(
    QUACK_ARCH="90",
    CUTE_DSL_ARCH="sm_90a",
    QUACK_CACHE_ENABLED="0",
    FLASH_ATTENTION_ARCH="sm_90",
    FLASH_ATTENTION_NUM_SMS="132",
    FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="0",
    CUTE_DSL_KEEP_CUBIN="1",
    CUTE_DSL_DUMP_DIR=str(FOLDER),
)

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from flowturbo_kernels import _flash_attention, _quack

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
E4M3 = torch.float8_e4m3fn


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def products(images: int) -> Iterator[tuple[str, dict[str, Any], tuple[torch.Tensor, ...]]]:
    """(operation and size, its candidates, their cold tensors) of guided calls with 256 tokens."""
    M, D = 2 * images * 256, 1152
    sizes = {"qkv": (D, 3 * D, False), "fc1": (D, 4 * D, True), "proj": (D, D, False)}
    for name, (K, N, gelu) in sizes.items():
        cold = empty(N, K), empty(N)
        yield f"{name} {M}", _quack.linear(empty(M, K), *cold, gelu), cold
    cold = empty(D, 4 * D), empty(D)
    rows = empty(2 * images, 256, 4 * D), empty(2 * images, 256, D), empty(2 * images, 6 * D)
    yield (
        f"fc2 {M}",
        _quack.linear_gated_residual(rows[0], *cold, rows[1], rows[2][:, 5 * D :]),
        cold,
    )
    one = torch.ones(1)
    for name, K, N, gelu, out_scale in (
        ("fp8 qkv", D, 3 * D, False, None),
        ("fp8 fc1", D, 4 * D, True, None),
        ("fp8 fc1 to fp8", D, 4 * D, True, one),
        ("fp8 to fp8", D, 3 * D, False, one),
        ("fp8 fc2", 4 * D, D, False, None),
    ):
        q, scale = empty(M, K, dtype=E4M3), empty(M, dtype=torch.float32)
        cold = empty(N, K, dtype=E4M3), empty(N, dtype=torch.float32), empty(N)
        candidates = _quack.fp8_candidates(q, scale, *cold, gelu=gelu, out_scale=out_scale)
        yield f"{name} {M}", candidates, cold


def without_device() -> None:
    """No kernel is launched, and what quack asks of a device is an H100's."""
    import quack.gemm_runtime.host as host
    from quack.epilogue.frontend import EpiMod
    from quack.epilogue.ops import Scalar

    host.get_max_active_clusters = lambda blocks: 132 // blocks
    Scalar._validate_pointer_value = lambda self, value: None  # "must be on CUDA"
    gemm = EpiMod.gemm
    EpiMod.gemm = lambda *args, **options: gemm(*args, **options, _launch=False)
    for module in (_quack, _flash_attention):
        module.LIBRARY.loaded = module._load()
        module.unavailable = lambda device: None


def compiled(name: str, run: Callable[[], Any]) -> None:
    """Prints what the kernel that this compiles is like; nothing where it was compiled before."""
    for path in FOLDER.iterdir():
        path.unlink()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    for path in FOLDER.glob("*.cubin"):
        usage = tool("cuobjdump", "--dump-resource-usage", path)
        code = tool("nvdisasm", "-c", path)
        found = {key.lower(): int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        shapes = sorted(set(re.findall(r"[HQ]GMMA\.(\d+x\d+x\d+)", code)))
        counts = {
            key: len(re.findall(pattern, code))
            for key, pattern in {
                "gmma": r"[HQ]GMMA\.",
                "tma_loads": "UTMALDG",
                "tma_stores": "UTMASTG",
                "local_accesses": r"\b(STL|LDL)\b",
                "waits_for_the_kernel_before": "ACQBULK",
                "reciprocals": r"MUFU\.RCP\b",
            }.items()
        }
        registers = re.findall(r"USETMAXREG\S*\s+(?:UP\w+,\s*)?(0x[0-9a-f]+|\d+)", code)
        print(
            json.dumps(
                {
                    "kernel": name,
                    "shapes": shapes,
                    **counts,
                    **found,
                    "registers_by_role": sorted({int(r, 0) for r in registers}),
                    "seconds": round(seconds, 1),
                }
            ),
            flush=True,
        )


def tool(name: str, *words: object) -> str:
    return subprocess.run(
        [TOOLS / name, *map(str, words)], capture_output=True, encoding="utf-8", check=True
    ).stdout


def main(words: list[str]) -> None:
    without_device()
    for images in (1, 8):
        for name, candidates, cold in products(images):
            for tile, kernel in candidates.items():
                full = f"{name} {tile}"
                if not words or any(word in full for word in words):
                    result = kernel.empty()
                    compiled(full, lambda k=kernel, r=result, c=cold: k.launch(r, *c))
    if words and "attention" not in words:
        return
    os.environ["FLASH_ATTENTION_FAKE_TENSOR"] = "1"
    for tokens in (256, 1024):
        with FakeTensorMode():
            qkv = torch.empty(16, tokens, 3, 16, 72, dtype=torch.bfloat16, device="cuda")
            for name, kernel in _flash_attention.candidates(qkv, None).items():
                if isinstance(kernel, _flash_attention.LibraryKernel):
                    result = kernel.empty()
                    compiled(f"attention {tokens} {name}", lambda k=kernel, r=result: k.launch(r))


if __name__ == "__main__":
    main(sys.argv[1:])
