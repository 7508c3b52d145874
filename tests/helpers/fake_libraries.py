"""Stand-ins for quack and FlashAttention-4 that compute with torch on the CPU, so that everything
around their kernels can be tested where neither is installed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flowturbo_kernels
from flowturbo_kernels import _flash_attention, _library, _quack

VERSIONS = {"quack-kernels": "0.6.5", "flash-attn-4": "4.0.0b36"}


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def applied(fn: Callable[..., Any], acc: Tensor, c: Tensor | None, operands: Any) -> Tensor:
    """An epilogue on sums `acc` (..., M, N): rows of operands are (..., N), columns (..., M)."""
    spread = {
        name: v if v.numel() == 1 else v.unsqueeze(-1 if name == "scale" else -2)
        for name, v in operands.items()
    }
    spread = {name: v.to(acc.dtype) for name, v in spread.items()}
    if c is not None:
        spread["c"] = c.to(acc.dtype)
    return fn(acc, **spread)["D"]


class Epilogue:
    """What quack's `gemm_epilogue` makes of a function: `gemm` checks what quack's would."""

    def __init__(self, fn: Callable[..., Any], log: list[Any]) -> None:
        self.fn, self.log = fn, log
        self.fails: Callable[[dict[str, Any]], None] = lambda options: None
        self.spoils: Callable[[Tensor], Tensor | None] = lambda result: result

    def gemm(self, A, B, D, C=None, *, epi_args, **options) -> None:
        self.log.append((self.fn.__name__, A, B, D, C, epi_args, options))
        self.fails(options)
        batch = A.shape[:-2] or (1,)
        for name, v in epi_args.items():
            length = A.shape[-2] if name == "scale" else B.shape[-2]
            assert v.numel() == 1 or v.shape == (*batch, length), name
        if A.ndim == 2:
            A, B = A[None], B[None]
        sums = A.to(torch.float32) @ B.to(torch.float32).mT
        y = applied(self.fn, sums, C, epi_args).view(D.shape)
        spoilt = self.spoils(y.clamp(-448, 448) if D.element_size() == 1 else y)
        if spoilt is not None:
            D.copy_(spoilt)


class Fakes:
    """Both installed, imported by nobody yet, on an H100.

    log: each call of a kernel. versions, capability, capturing: may be changed.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.log: list[Any] = []
        self.versions = dict(VERSIONS)
        self.capability = (9, 0)
        self.capturing = False
        self.monkeypatch = monkeypatch
        device = torch.device("cuda", 0)
        monkeypatch.setattr(_library, "version", self.versions.get)
        monkeypatch.setattr(_library, "_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        for module in (_quack, _flash_attention):
            # tensors of the test are on the CPU
            monkeypatch.setattr(
                module, "unavailable", lambda _, lib=module.LIBRARY: lib.unavailable(device)
            )
        self.install()
        self.forget()

    def forget(self) -> None:
        """As a new process begins."""
        _quack.LIBRARY.forget()
        _flash_attention.LIBRARY.forget()
        if sys.modules.pop("flowturbo_kernels._quack_epilogues", None) is not None:
            del flowturbo_kernels._quack_epilogues

    def install(self) -> None:
        def attention(q, k, v, *, tile_mn, out) -> None:
            self.log.append((q, k, v, tile_mn, out))
            heads_first = (t.transpose(1, 2).to(torch.float32) for t in (q, k, v))
            out.copy_(F.scaled_dot_product_attention(*heads_first).transpose(1, 2))

        self.module("quack")
        self.module("quack.cache", CACHE_DIR=None, CACHE_ENABLED=True)
        self.module("quack.activation", gelu_tanh_approx=gelu_tanh)
        self.module("quack.epilogue")
        self.module(
            "quack.epilogue.frontend",
            gemm_epilogue=lambda ops: lambda fn: Epilogue(fn, self.log),
        )
        kinds = {"ColVecLoad": str, "RowVecLoad": str}
        self.module("quack.epilogue.ops", **kinds)
        self.module("flash_attn")
        self.module("flash_attn.cute")
        self.module("flash_attn.cute.interface", _flash_attn_fwd=attention)

    def module(self, name: str, **contents: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(contents, __path__=[])
        self.monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)

    def broken_import(self, name: str) -> None:
        """Importing that module raises ImportError."""
        self.monkeypatch.setitem(sys.modules, name, None)

    def epilogue(self, name: str) -> Epilogue:
        """One of quack's, once it was imported."""
        return getattr(_quack.LIBRARY.loaded, name)
