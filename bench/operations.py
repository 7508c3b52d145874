"""The operations that are timed: their arguments at the sizes of published models, and a name for
each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from roofline import WEIGHTS
from torch import Tensor

from flowturbo_kernels import sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=DTYPE)


def shapes(
    batch: int, made: Callable[..., Tensor] = make, published: bool = DEVICE == "cuda"
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(operation, arguments) of SiT-XL/2 at 256 x 256 and of the SD decoder on a GPU; of a small
    model elsewhere.
    """
    if published:
        yield from sizes.sit(made, batch)
        yield from sizes.sit_fp8(made, batch)
        yield from sizes.vae(made, batch)
    else:
        yield from sizes.sit(made, batch, hidden=96, heads=4, side=8)


def described(name: str, args: tuple[Any, ...]) -> str:
    """The operation, the shape of its first argument, and what else tells it from others of its
    name at that shape.
    """
    text = f"{name} {'x'.join(map(str, args[0].shape))}"
    if name in WEIGHTS:
        text += f" to {args[WEIGHTS[name]].shape[0]}"
    text += "".join(f", {argument}" for argument in args if isinstance(argument, str))
    if name == "patch_embed" and args[3] is not None:
        text += " and velocity"
    if name == "final_update":
        text += "" if args[9] is None else " from a base"
    return text


@functools.cache
def groups(batch: int) -> list[str]:
    """The benchmark groups of all operations, in order."""
    return [f"{described(name, args)} batch {batch}" for name, args in shapes(batch, meta)]
