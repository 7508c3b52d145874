"""The matrix products of quack (quack-kernels, Dao-AILab) as candidates, on sm_90 to sm_110: TMA
loads, persistent blocks, and a tile of 256x144, of which 1152 is a multiple.

One compiled kernel serves all sizes: a tile, an epilogue and the dtypes make a kernel. Compiled
ones are kept on disk below flowturbo's cache folder, or where QUACK_CACHE_DIR says.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cache import cache_folder
from ._e4m3 import in_e4m3, ones
from ._library import Check, Key, Library, LibraryKernel
from ._tune import form

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_MULTIPROCESSORS = 132
_BOUND = 0.01
"""Two right results in 16 bits differ by less; bf16 rounds by 0.0017 (2-norm)."""
_FP8_BOUND = 0.04
"""And in e4m3, which rounds by 0.026, if a tenth of them round to the other side."""
_CHECKED_ROWS = 1024


class Tile(NamedTuple):
    """A block's part of the result, and how blocks work together.

    ping_pong: two tiles at a time, one multiplied while the other is stored. cluster: so many
    blocks below each other, which read the weights together. split: parts of K, each its own
    block's; they are added in a fixed order.
    """

    rows: int
    columns: int
    ping_pong: bool = False
    cluster: int = 1
    split: int = 1

    def __str__(self) -> str:
        return (
            f"quack {self.rows}x{self.columns}{' ping-pong' if self.ping_pong else ''}"
            f"{f' split {self.split}' if self.split > 1 else ''}"
        )


@functools.lru_cache(1024)
def tiles(images: int, M: int, N: int, K: int) -> tuple[Tile, ...]:
    """What may be fastest for products of (images, M, K) with (N, K): large tiles where they fill
    the device, small ones and splits of K where they don't.
    """
    width = 144 if N % 144 == 0 else 128

    def count(rows: int) -> int:
        return images * -(-M // rows) * -(-N // width)

    def cluster(rows: int) -> int:
        return 2 - -(-M // rows) % 2

    found = [Tile(128, width, cluster=cluster(128))]
    if 2 * count(256) >= _MULTIPROCESSORS:
        found.append(Tile(256, width, cluster=cluster(256)))
    if count(128) >= _MULTIPROCESSORS:
        found.append(Tile(128, width, ping_pong=True, cluster=cluster(128)))
    else:
        found.append(Tile(64, width, cluster=cluster(64)))
        found += [
            Tile(rows, width, cluster=cluster(rows), split=split)
            for rows in (128, 64)
            for split in (2, 4)
            if count(rows) * split <= _MULTIPROCESSORS and 256 * split <= K
        ]
    return tuple(found)


def _load() -> Any:
    """Our epilogues, compiled by quack. quack reads its settings at its first import."""
    fresh = "quack" not in sys.modules
    import quack.cache

    from . import _quack_epilogues

    if fresh and "QUACK_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "quack"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            quack.cache.CACHE_DIR = str(folder)
        except OSError:  # each process compiles anew
            quack.cache.CACHE_ENABLED = False
    return _quack_epilogues


def _lacks(capability: tuple[int, int]) -> str | None:
    if capability < (9, 0):
        return "the GPU is older than sm_90"
    if capability >= (12, 0):
        return "it has no such kernels for sm_120"
    return None


LIBRARY = Library("quack-kernels", "0.6.5", _load, _lacks)


def unavailable(device: torch.device) -> str | None:
    """Why quack's kernels are no candidates on that device, or None."""
    return LIBRARY.unavailable(device)


class _Product(NamedTuple):
    """x (M, K) or (images, M, K) times weight (N, K) transposed, with an epilogue.

    operands: (weight, ...) as cold tensors -> the epilogue's, by name. check: as LibraryKernel's.
    """

    epilogue: str
    x: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    operands: Callable[..., dict[str, Tensor]]
    check: Check
    residual: Tensor | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.x.device)

    def launch(self, tile: Tile, result: Tensor, weight: Tensor, *cold: Tensor) -> None:
        if self.x.ndim == 3:
            weight = weight.expand(len(self.x), *weight.shape)
        getattr(LIBRARY.loaded, self.epilogue).gemm(
            self.x, weight, result, self.residual, epi_args=self.operands(*cold),
            tile_M=tile.rows, tile_N=tile.columns, cluster_M=tile.cluster, cluster_N=1,
            pingpong=tile.ping_pong, split_k=tile.split, post_init_attrs=self.settings,
        )  # fmt: skip

    def candidates(self, key: Key, bound: float) -> dict[str, LibraryKernel]:
        images, (M, K) = (len(self.x) if self.x.ndim == 3 else 1), self.x.shape[-2:]
        return {
            str(tile): LibraryKernel(
                LIBRARY,
                (str(tile), self.x.device, self.epilogue, self.dtype, key),
                self.empty,
                partial(self.launch, tile),
                self.check,
                bound,
            )
            for tile in tiles(images, M, self.shape[-1], K)
        }


def linear(flat: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> dict[str, LibraryKernel]:
    """Candidates for flat (M, K) times weight (N, K) transposed, plus bias (N,), through tanh-GELU
    if asked for: functions of (weight, bias) -> (M, N). None where quack can't take the arguments.
    """
    if flat.dtype not in _SIXTEEN_BITS or not _takes(flat, weight, (bias,)):
        return {}

    def check(result: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        some = _some(len(flat))
        y = F.linear(flat[some], weight, bias)
        return result[some], F.gelu(y, approximate="tanh") if gelu else y

    return _Product(
        "with_gelu" if gelu else "with_bias",
        flat,
        (len(flat), len(weight)),
        flat.dtype,
        lambda bias: {"bias": bias[None]},
        check,
    ).candidates((form(flat), form(weight), form(bias)), _BOUND)


def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor
) -> dict[str, LibraryKernel]:
    """Candidates for residual + gate * (x times weight transposed, plus bias), of x (B, T, K),
    weight (N, K), bias (N,), residual (B, T, N), gate (B, N): functions of (weight, bias) ->
    (B, T, N). None where quack can't take the arguments.

    Rows are batched by image, so that the gate is one row for all rows of an image.
    """
    if x.dtype not in _SIXTEEN_BITS or not x.dtype == residual.dtype == gate.dtype:
        return {}
    if not _takes(x, weight, (bias, gate)) or not _aligned(residual):
        return {}
    (B, T, K), N = x.shape, len(weight)

    def check(result: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        some = _some(B * T)
        image = torch.arange(B * T, device=x.device)[some] // T
        y = F.linear(x.reshape(-1, K)[some], weight, bias).to(torch.float32)
        y = residual.reshape(-1, N)[some].to(torch.float32) + gate.to(torch.float32)[image] * y
        return result.view(-1, N)[some], y

    return _Product(
        "gated_residual",
        x,
        (B, T, N),
        residual.dtype,
        lambda bias: {"bias": bias.expand(B, N), "gate": gate},
        check,
        residual,
    ).candidates(tuple(map(form, (x, weight, bias, residual, gate))), _BOUND)


def fp8_candidates(
    q: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    gelu: bool,
    out_scale: Tensor | None = None,
) -> dict[str, Callable[..., Tensor]]:
    """Candidates, by name, for y = q times weight transposed, times scale and weight_scale, plus
    bias, through tanh-GELU if `gelu`. Each is a function of (weight, weight_scale, bias), which may
    be copies, so a caller's `cold` tensors: `Candidates(question, {**ours, **fp8_candidates(...)},
    device, (weight, weight_scale, bias))`.

    q (M, K) and weight (N, K) float8_e4m3fn, rows dense; scale (M,), one a row, or None, and
    weight_scale (N,), one a column of y, float32; bias (N,), 16 bits -> (M, N) in bias's dtype.
    out_scale: (1,) float32 on the device, a static scale: y / out_scale is returned, in
    float8_e4m3fn, cut off at 448, so that y ~ result * out_scale.

    Sums are made in the tensor cores' own accumulators ("fast accumulation", as torch's scaled
    product with use_fast_accum). Nothing where quack is unavailable or can't take the arguments:
    K must be a multiple of 16, N of 8, or of 16 for a result in fp8.
    """
    fp8 = torch.float8_e4m3fn
    if unavailable(q.device) or not q.dtype == weight.dtype == fp8:
        return {}
    if bias.dtype not in _SIXTEEN_BITS or len(weight) % (8 if out_scale is None else 16):
        return {}
    vectors = (weight_scale, bias) if scale is None else (scale, weight_scale, bias)
    if not _takes(q, weight, vectors):
        return {}
    extra = {} if out_scale is None else {"out_scale": out_scale}

    def check(
        result: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        some, wide = _some(len(q)), torch.float32
        y = q[some].to(wide) @ weight.to(wide).t()
        y = (y if scale is None else y * scale[some, None]) * weight_scale + bias
        y = F.gelu(y, approximate="tanh") if gelu else y
        return result[some], y if out_scale is None else in_e4m3(y, out_scale)

    products = _Product(
        f"scaled{'_gelu' if gelu else ''}{'' if out_scale is None else '_to_fp8'}",
        q,
        (len(q), len(weight)),
        bias.dtype if out_scale is None else fp8,
        lambda weight_scale, bias: {
            "scale": (ones(len(q), q.device) if scale is None else scale)[None],
            "weight_scale": weight_scale[None],
            "bias": bias[None],
            **extra,
        },
        check,
        settings=(("fp8_slow_accum", False),),
    ).candidates(
        tuple(map(form, (q, weight, *vectors))),
        _BOUND if out_scale is None else _FP8_BOUND,
    )
    return dict(products)


def _some(M: int) -> slice:
    """Of so many rows those that are checked: with an odd step, so that they lie everywhere in
    tiles.
    """
    return slice(None, None, -(-M // _CHECKED_ROWS) | 1)


def _takes(x: Tensor, weight: Tensor, vectors: tuple[Tensor, ...]) -> bool:
    """Whether strides and addresses are such as TMA needs: 16 bytes, and 4 numbers in vectors."""
    return (
        unavailable(x.device) is None
        and len(weight) % 8 == 0
        and _aligned(x)
        and _aligned(weight)
        and all(
            v.stride(-1) == 1
            and v.data_ptr() % (4 * v.element_size()) == 0
            and (v.ndim == 1 or v.stride(0) % 4 == 0)
            for v in vectors
        )
    )


def _aligned(x: Tensor) -> bool:
    size = x.element_size()
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and x.shape[-1] * size % 16 == 0
        and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
    )
