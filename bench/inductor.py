"""The best that torch.compile can be asked for, as options of one call of it: no other network is
compiled with them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import nn

EXHAUSTIVE = "FLOWTURBO_BENCH_EXHAUSTIVE"
"""Set to 1 in the environment: every tile of products that Inductor knows, and CUTLASS's where it
is, which takes hours.
"""

OPTIONS: dict[str, Any] = {
    # as the environment's ENABLE_PERSISTENT_TMA_MATMUL=1
    "triton.enable_persistent_tma_matmul": True,
    # upstream's default: with programmatic dependent launch some of its kernels were slower
    "triton.enable_pdl": False,
}


def best(graphs: bool) -> tuple[Callable[[nn.Module], Any], str]:
    """What compiles a network for its largest speed, and in words how. graphs: with a CUDA graph
    for each of its calls.
    """
    mode = "max-autotune" if graphs else "max-autotune-no-cudagraphs"
    wanted, said = dict(OPTIONS), [mode]
    if os.environ.get(EXHAUSTIVE) == "1":
        wanted["max_autotune_gemm_search_space"] = "EXHAUSTIVE"
        lacking = no_cutlass()
        if lacking is None:
            wanted["max_autotune_gemm_backends"] = "ATEN,TRITON,CUTLASS"
        else:
            said.append(f"no CUTLASS ({lacking})")
    known = set(torch._inductor.list_options())
    options = {name: value for name, value in wanted.items() if name in known}
    said += [f"{name}={value}" for name, value in options.items()]
    said += [f"no {name} in torch {torch.__version__}" for name in wanted if name not in known]
    options = {**torch._inductor.list_mode_options(mode), **options}

    def compiled(network: nn.Module) -> Any:
        # Sizes are known: the same compiled code serves all plans of one batch size.
        return torch.compile(network, options=options, fullgraph=True, dynamic=False)

    return compiled, ", ".join(said)


def no_cutlass() -> str | None:
    """Why Inductor can't use CUTLASS here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    from torch._inductor import config

    place = getattr(config, "cutlass", None) or config.cuda
    folder = Path(place.cutlass_dir)
    return (
        None
        if (folder / "python" / "cutlass_library").is_dir()
        else f"no CUTLASS in {folder.name or folder}"
    )
