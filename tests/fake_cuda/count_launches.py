"""How many launches, by kernel: of calls of SiT-XL/2 and of whole captured plans, as the table in
docs/launches.md.

    python tests/fake_cuda/run.py python tests/fake_cuda/count_launches.py > docs/launches.md

tests/fake_cuda/test_launches.py holds the package to that table, so that a change that adds a
launch is seen at once.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

from decoder import Autoencoder  # noqa: E402

import fake_cuda  # noqa: E402
import flowturbo as ft  # noqa: E402
from flowturbo.models.random_weights import untrained  # noqa: E402
from flowturbo.models.vae import DiffusersVAE  # noqa: E402
from flowturbo.models.vae_fusion import fuse  # noqa: E402
from flowturbo.sampling.velocity_field import HoistedField  # noqa: E402

PAGE = ROOT / "docs" / "launches.md"
PLAN = "H1P5R3"
KINDS = {
    # what a reader calls it: how its name is found among what torch and its libraries launch
    "matrix products (cuBLAS)": r"cublas",
    "convolutions (cuDNN)": r"cudnn",
    "attention (torch)": r"fmha|flash_fwd|AttentionKernel",
    "GroupNorm (torch)": r"RowwiseMoments|ComputeFusedParams|GroupNorm",
    "upsampling (torch)": r"upsample",
    "concatenations (torch)": r"CatArray",
    "copies and casts (torch)": r"copy_kernel|memcpy",
    "SiLU (torch)": r"silu_kernel",
    "other elementwise (torch)": r"elementwise|indexSelect|arange|memset",
}
HEAD = """# Launches

Kernels launched by SiT-XL/2 at 256 x 256 in bfloat16 on an H100, guided, and by Stable Diffusion's
decoder: counts, not times. They are the same at batch 1 and 8. A predictor call and a refiner call
are those of a plan, without the modulations, which the plan makes once; a plan's are the nodes of
its CUDA graph. Counted with torch 2.11 on a stand-in for a CUDA device, where torch and Triton run
and kernels do nothing. No time means anything there, so where the library takes the fastest of
several ways, this counts the first of them. A test holds the package to this table.

"""


def kind(name: str) -> str:
    """What a launch is called in the table: our own kernels by their name."""
    ours = re.fullmatch(r"(_\w+_kernel)|void (flowturbo::\w+).*", name)
    if ours:
        return f"`{ours[1] or ours[2]}`"
    return next(
        (label for label, pattern in KINDS.items() if re.search(pattern, name)), "other (torch)"
    )


def counts(batch: int) -> dict[str, Counter[str]]:
    """Of each kind of work, how often each kernel is launched."""
    device = torch.device("cuda", 0)
    vae = Autoencoder().requires_grad_(False).eval().to(device, torch.bfloat16)
    fuse(vae)
    model = ft.load(
        *untrained("SiT-XL/2", 256, device), DiffusersVAE(vae), device=device, dtype=torch.bfloat16
    )
    found = {
        "predictor call": called(model, "predict_ahead_and_move", batch),
        "refiner call": called(model, "refine_and_move", batch),
    }
    latents = torch.zeros(batch, 4, 32, 32, device=device)
    model.decode(latents)
    fake_cuda.launches()
    model.decode(latents)
    found["decoding"] = Counter(map(kind, fake_cuda.launches()))
    for output, title in (("latents", PLAN), ("uint8", f"{PLAN} with decoding")):
        ft.compile(model, PLAN, batch, output=output)
        found[title] = Counter(map(kind, fake_cuda.captured()))
    model.predictor.quantize_()
    found["predictor call in fp8"] = called(model, "predict_ahead_and_move", batch)
    return found


def called(model: ft.FlowModel, method: str, batch: int) -> Counter[str]:
    """The launches of the last call of a field's method in a plan without a graph; choices are
    measured in a run before.
    """
    original: Callable[..., Any] = getattr(HoistedField, method)
    seen: list[list[str]] = []

    def counted(*args: Any) -> Any:
        fake_cuda.launches()
        result = original(*args)
        seen.append(fake_cuda.launches())
        return result

    with mock.patch.object(HoistedField, method, counted):
        for _ in range(2):
            ft.sample(
                model, PLAN, list(range(batch)), guidance=1.5, seed=0, callback=lambda info: None
            )
    return Counter(map(kind, seen[-1]))


def table(found: dict[str, Counter[str]]) -> str:
    kinds = sorted(
        set().union(*found.values()), key=lambda k: (-max(c[k] for c in found.values()), k)
    )
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "--:|" * len(found)]
    lines += [
        f"| {k} | " + " | ".join(str(c[k] or "") for c in found.values()) + " |" for k in kinds
    ]
    lines.append("| all | " + " | ".join(str(c.total()) for c in found.values()) + " |")
    return "\n".join(lines) + "\n"


def of_our_own(text: str) -> list[str]:
    """The rows that another version of torch should not change: all but those of its own kernels,
    and the sum.
    """
    return [
        line
        for line in text.splitlines()
        if line.startswith("| ") and "(torch)" not in line and "| all |" not in line
    ]


if __name__ == "__main__":
    sys.stdout.write(HEAD + table(counts(8)))
