"""Attention by other libraries' kernels, as candidates: torch's backends, each by its name, and
FlashAttention-4 (flash-attn-4, Dao-AILab), which reads the packed qkv in place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._cache import cache_folder
from ._library import Library, LibraryKernel
from ._tune import form

TILE = (128, 128)
"""Queries and keys of a block. FlashAttention-4 would take 192x144 for 72 numbers a head, which at
256 tokens works on 384x288."""
_BOUND = 0.01
"""Two right results in 16 bits differ by less."""


def candidates(
    qkv: Tensor, reference: Callable[[Tensor], Tensor]
) -> dict[str, Callable[..., Tensor]]:
    """By name, functions of nothing -> (B, T, heads * head_dim)."""
    functions: dict[str, Callable[..., Tensor]] = {
        f"torch {name}": partial(_torch, name, qkv) for name in _BACKENDS if _ENABLED[name]()
    }
    if _takes(qkv):
        functions["flash-attention 4 128x128"] = _flash_attention_4(qkv, reference)
    return functions


# The backends are called as operators, which torch's own choice ends in. `sdpa_kernel` would turn
# the others off for the whole process meanwhile: other threads would get another backend than they
# asked for, and, where two threads do it, settings could stay off.
_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False
    ),
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v),
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, False
    ),
}
_ENABLED: dict[str, Callable[[], bool]] = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
}
"""Settings of torch: a backend that the program turned off is no candidate."""


def _torch(name: str, qkv: Tensor) -> Tensor:
    B, T, _, heads, head_dim = qkv.shape
    out: Tensor = _BACKENDS[name](*qkv.permute(2, 0, 3, 1, 4))[0]
    return out.transpose(1, 2).reshape(B, T, heads * head_dim)


def _load() -> Any:
    with _settings_at_import():
        from flash_attn.cute import interface
    return interface._flash_attn_fwd  # the public function takes no tile


@contextmanager
def _settings_at_import() -> Iterator[None]:
    """Compiled kernels are kept on disk below our cache folder, unless the user or an earlier
    import has decided.
    """
    names = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    folder = cache_folder() / "flash-attention-4"
    ours = not any(name in os.environ for name in names) and "flash_attn.cute" not in sys.modules
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        ours = False
    if ours:
        os.environ.update(zip(names, ("1", str(folder)), strict=True))
    try:
        yield
    finally:
        for name in names if ours else ():
            del os.environ[name]


def _lacks(capability: tuple[int, int]) -> str | None:
    return "the GPU is older than sm_90" if capability < (9, 0) else None


LIBRARY = Library("flash-attn-4", "4.0.0b36", _load, _lacks)


def unavailable(device: torch.device) -> str | None:
    """Why FlashAttention-4 is no candidate on that device, or None."""
    return LIBRARY.unavailable(device)


def _takes(qkv: Tensor) -> bool:
    """Whether it reads qkv where it lies: else it would copy it."""
    return (
        qkv.dtype in (torch.float16, torch.bfloat16)
        and qkv.shape[-1] % 8 == 0
        and qkv.stride(-1) == 1
        and qkv.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in qkv.stride()[:-1])
        and unavailable(qkv.device) is None
    )


def _flash_attention_4(qkv: Tensor, reference: Callable[[Tensor], Tensor]) -> LibraryKernel:
    B, T, _, heads, head_dim = qkv.shape

    def launch(result: Tensor) -> None:
        q, k, v = qkv.unbind(2)
        LIBRARY.loaded(q, k, v, tile_mn=TILE, out=result.view(B, T, heads, head_dim))

    def check(result: Tensor) -> tuple[Tensor, Tensor]:
        ends = slice(None, None, max(1, B - 1))  # the first and the last image
        return result[ends], reference(qkv[ends])

    return LibraryKernel(
        LIBRARY,
        ("flash-attention 4 128x128", qkv.device, form(qkv)),
        lambda: torch.empty(B, T, heads * head_dim, dtype=qkv.dtype, device=qkv.device),
        launch,
        check,
        _BOUND,
    )
