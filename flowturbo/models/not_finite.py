"""Images that are not finite. NaN would become black pixels, so it is noted before it is rounded.

A network overflows in float16, or has a weight that is not finite. What is found travels with the
images, since a captured run gives one tensor and may not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import listed

LATENTS, PIXELS = 1, 2
"""Faults: what of an image holds NaN or infinity; 0: nothing."""

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
    return f"{count}: {listed(numbers, name=name)}: {what}: {cure}"


def image_name(
    number: int,
    label: int | str | None = None,
    seed: int | None = None,
    class_name: str | None = None,
) -> str:
    """What messages call an image: "image 3 (label 7, cat, seed 0)", of what is known."""
    facts = []
    if label is not None:
        facts.append(f"{'prompt' if isinstance(label, str) else 'label'} {label!r}")
    if class_name is not None:
        facts.append(class_name)
    if seed is not None:
        facts.append(f"seed {seed}")
    return f"image {number} ({', '.join(facts)})" if facts else f"image {number}"


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


Noted = Tensor
"""(2, N) float32: the largest magnitudes in the pixels and in the latents of each image, or NaN."""
_EXACT = (torch.float32, torch.float16, torch.bfloat16)


def nothing_noted(images: int, device: torch.device) -> Noted:
    """To be filled by `note`, both rows."""
    return torch.empty(2, images, dtype=torch.float32, device=device)


def note(noted: Noted, part: int, x: Tensor, first: int = 0) -> None:
    """Note whether x (n, ...) is finite, in one pass on the device, of images from `first` on.

    part: LATENTS or PIXELS, what x is.
    """
    x, rest = x.detach(), tuple(range(1, x.ndim))
    slot = noted[int(part == LATENTS), first : first + len(x)]
    if x.dtype in _EXACT and x.device == noted.device:
        torch.linalg.vector_norm(x, math.inf, rest, dtype=torch.float32, out=slot)
    else:
        slot.copy_(torch.where(finite_rows(x), 0.0, math.nan))


def faults_of(noted: Noted) -> Tensor:
    """What was noted -> the fault of each image, (N,)."""
    pixels, latents = ~(noted < math.inf)  # NaN is not less
    return torch.where(latents, LATENTS, PIXELS * pixels)


def pack(images: Tensor, noted: Noted) -> Tensor:
    """images (N, height, ..., 3) uint8 -> one tensor (N, height + rows, ..., 3) of both.

    A captured run gives one tensor. It is another than the images, which may be a buffer.
    """
    height = images.shape[1]
    packed = images.new_empty((len(images), height + _rows(images), *images.shape[2:]))
    packed[:, :height] = images
    notes = _rowwise(noted.to(packed.device).T).view(torch.uint8)
    packed[:, height:].flatten(1)[:, : notes.shape[1]] = notes
    return packed


def unpack(packed: Tensor) -> tuple[Tensor, Noted]:
    """What `pack` made -> images, what was noted."""
    rows = _rows(packed)
    notes = _rowwise(packed[:, -rows:].flatten(1)[:, :8]).view(torch.float32)
    return packed[:, :-rows], notes.T


def _rowwise(x: Tensor) -> Tensor:
    """A copy, row after row; also of a single row, so that launches are those of any batch."""
    return x.clone(memory_format=torch.contiguous_format)


def _rows(images: Tensor) -> int:
    """How many rows of an image hold what is noted of it: 8 bytes."""
    return -(-8 // math.prod(images.shape[2:]))


def readable(noted: Noted) -> bool:
    """Whether the values can be read now: not in somebody's capture, trace or on meta."""
    return not (
        noted.is_meta
        or torch.compiler.is_compiling()
        or (noted.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def checked(noted: Noted, images: Tensor, dtypes: Dtypes, name: Name = image_name) -> Tensor:
    """The images; NotFiniteError if any is not finite. One read from the device.

    In a capture nothing can be read, and nothing is checked.
    """
    if readable(noted) and any(found := faults_of(noted.cpu()).tolist()):
        raise NotFiniteError.of(found, images, dtypes, name)
    return images
