"""Images that are not finite. NaN would become black pixels, so it is noted before it is rounded.

A network overflows in float16, or has a weight that is not finite. What is found travels with the
images, since a captured run gives one tensor and may not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LATENTS, PIXELS = 1, 2
"""Faults: what of an image holds NaN or infinity; 0: nothing."""
MOST_NAMED = 8
"""The most images that a message names."""

Dtypes = tuple[torch.dtype, torch.dtype | None]
"""Of the networks and of the autoencoder, if it has one."""
Name = Callable[[int], str]


class NotFiniteError(FloatingPointError):
    """Images whose latents or pixels hold NaN or infinity.

    numbers: theirs, among those of the call.
    images: all images of the call, (N, height, width, 3) uint8. Those of `numbers` mean nothing,
        all others are whole.
    """

    numbers: list[int]
    images: Tensor
    faults: list[int]
    dtypes: Dtypes

    @classmethod
    def of(
        cls, faults: Sequence[int], images: Tensor, dtypes: Dtypes, name: Name
    ) -> NotFiniteError:
        """faults: of each image. name: number -> what to call the image, such as "image 3"."""
        numbers = [i for i, fault in enumerate(faults) if fault]
        error = cls(_message(faults, numbers, dtypes, name))
        error.numbers, error.images, error.faults, error.dtypes = numbers, images, [*faults], dtypes
        return error

    def named(self, name: Name) -> NotFiniteError:
        """The same error with other names."""
        return self.of(self.faults, self.images, self.dtypes, name)


def _message(faults: Sequence[int], numbers: list[int], dtypes: Dtypes, name: Name) -> str:
    latents = any(faults[i] == LATENTS for i in numbers)
    if latents:
        what, part = "latents hold NaN or infinity", "the model"
    else:
        what, part = "latents are finite, but not what the vae made of them", "the vae"
    dtype = dtypes[0 if latents else 1]
    cure = (
        f"{part} overflows in float16, so load it in bfloat16 or float32"
        if dtype == torch.float16
        else f"{part} has weights that are not finite, or overflows"
    )
    count = f"{len(numbers)} of {len(faults)} images are not finite"
    return f"{count}: {listed(numbers, name)}: {what}: {cure}"


def image_name(number: int, label: int | str | None = None, seed: int | None = None) -> str:
    """What messages call an image: "image 3 (label 7, seed 0)", of what is known."""
    facts = []
    if label is not None:
        facts.append(f"{'prompt' if isinstance(label, str) else 'label'} {label!r}")
    if seed is not None:
        facts.append(f"seed {seed}")
    return f"image {number} ({', '.join(facts)})" if facts else f"image {number}"


def listed(numbers: Sequence[int], name: Name = str) -> str:
    """The first few of these numbers, and how many more there are."""
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return ", ".join(map(name, numbers[:MOST_NAMED])) + more


def not_finite_rows(x: Tensor) -> list[int]:
    """x (N, ...) -> the numbers of the rows that hold NaN or infinity. Reads from the device."""
    return (~finite_rows(x)).nonzero().flatten().tolist()


def finite_rows(x: Tensor) -> Tensor:
    """x (N, ...) -> (N,) bool: which rows hold neither NaN nor infinity."""
    if not x.is_floating_point():
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    # NaN makes both extremes NaN. They are two passes, in any layout; isfinite() of all is more.
    rest = tuple(range(1, x.ndim))
    return x.amax(rest).isfinite() & x.amin(rest).isfinite()


_SLOTS = 8
"""Bytes that hold what was noted of an image: of its pixels and of its latents, as float32."""
_EXACT = (torch.float32, torch.float16, torch.bfloat16)


def with_rows(images: Tensor, pixels: Tensor | None) -> Tensor:
    """images (N, height, ..., 3) uint8 -> (N, height + rows, ..., 3), a tensor of its own.

    The bytes of the last rows hold what `note` writes. pixels: (N, ...), of which the images were
    made; None: they can't be looked at.
    """
    packed = images.new_empty((len(images), images.shape[1] + _rows(images), *images.shape[2:]))
    packed[:, : images.shape[1]] = images
    return note(packed, PIXELS, images.new_zeros(len(images), 1) if pixels is None else pixels)


def note(packed: Tensor, part: int, x: Tensor) -> Tensor:
    """Note whether x (N, ...) is finite, in one pass on the device -> packed.

    part: LATENTS or PIXELS, what x is. What is noted is the largest magnitude, or NaN.
    """
    x, rest = x.detach(), tuple(range(1, x.ndim))
    flat, place = packed[:, -_rows(packed) :].flatten(1), 4 * (part == LATENTS)
    aligned = not (flat.storage_offset() % 4 or flat.stride(0) % 4)
    if aligned and x.dtype in _EXACT and x.device == packed.device:
        slot = flat[:, :_SLOTS].view(torch.float32)[:, place // 4]
        torch.linalg.vector_norm(x, math.inf, rest, dtype=torch.float32, out=slot)
    else:
        broken = torch.where(finite_rows(x), 0.0, math.nan).to(packed.device, torch.float32)
        flat[:, place : place + 4] = broken[:, None].view(torch.uint8)
    return packed


def _rows(images: Tensor) -> int:
    """How many rows of an image hold what is noted of it."""
    return -(-_SLOTS // math.prod(images.shape[2:]))


def split_faults(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `with_rows` and `note` made -> images, faults (N,)."""
    rows = _rows(packed)
    noted = packed[:, -rows:].flatten(1)[:, :_SLOTS].contiguous().view(torch.float32)
    pixels, latents = (~(noted < math.inf)).unbind(1)  # NaN is not less
    return packed[:, :-rows], torch.where(latents, LATENTS, PIXELS * pixels)


def readable(faults: Tensor) -> bool:
    """Whether the values can be read now: not in somebody's capture, trace or on meta."""
    return not (
        faults.is_meta
        or torch.compiler.is_compiling()
        or (faults.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def checked(faults: Tensor, images: Tensor, dtypes: Dtypes, name: Name = image_name) -> Tensor:
    """The images; NotFiniteError if any has a fault. One read from the device.

    faults: (N,), of each image. In a capture nothing can be read, and nothing is checked.
    """
    if readable(faults) and any(found := faults.tolist()):
        raise NotFiniteError.of(found, images, dtypes, name)
    return images
