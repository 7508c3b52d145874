"""The positions of a SiT's patches, at its own size and at others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowturbo_kernels.conditions import MAX_PERIOD

_NEAR = 0.02
"""By which sines may be off: in bfloat16 they are by 0.004, and others by 1."""


def sincos_positions(
    hidden: int,
    side: int,
    grid: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fixed 2-D sine and cosine position embedding, (rows * columns, hidden), float32.

    The first half of the features encodes the column, the second half the row.
    side: of the grid of patches that the positions are those of: 0 to side - 1.
    grid: (rows, columns), stretched to that grid, so that patches keep their places in the image:
        patch i of n is at (i + 0.5) * side / n - 0.5. None: the grid itself.
    """
    rows, columns = grid or (side, side)
    quarter = torch.arange(hidden // 4, dtype=torch.float64, device=device)
    omega = 1.0 / MAX_PERIOD ** (quarter / (hidden / 4))
    row, column = torch.meshgrid(
        *[
            (torch.arange(n, dtype=torch.float64, device=device) + 0.5) * side / n - 0.5
            for n in (rows, columns)
        ],
        indexing="ij",
    )
    features = []
    for coordinates in (column, row):
        angles = coordinates.reshape(-1, 1) * omega
        features += [angles.sin(), angles.cos()]
    return torch.cat(features, dim=1).float()


class Positions:
    """The positions of a network at sizes other than its own, each computed once for a device and
    a dtype.

    Copies and pickles of it are empty. Nothing is ever dropped: a captured graph may read it.
    """

    def __init__(self, hidden: int, side: int) -> None:
        self.hidden, self.side = hidden, side
        self._known: dict[Any, Tensor] = {}

    def __reduce__(self) -> Any:
        return Positions, (self.hidden, self.side)

    def at(self, grid: tuple[int, int], own: Tensor) -> Tensor:
        """The positions of a grid of patches, (rows * columns, D).

        own: those of the network's own grid, (side * side, D), whose dtype and device they get.
        Raises ValueError if these are no sines, which can't be stretched.
        """
        if grid == (self.side, self.side):
            return own
        if torch.compiler.is_compiling():
            return self._computed(grid, own, own.device)
        key = grid, own.device, own.dtype
        known = self._known.get(key)
        if known is None and _capturing(own):
            # A tensor of a graph's own memory can't be kept, and none can be copied from the host.
            return self._computed(grid, own, own.device)
        if known is None:
            # On the host, and with modes off: whoever finds it may be on another stream, or train.
            with torch.inference_mode(False), torch.no_grad():
                self._check(own)
                known = self._computed(grid, own, "cpu")
            if type(known) is Tensor:  # rather than one of FakeTensorMode
                known = self._known.setdefault(key, known)
        return known

    def _computed(
        self, grid: tuple[int, int] | None, own: Tensor, device: torch.device | str
    ) -> Tensor:
        # In float64, which autocast leaves as it is.
        return sincos_positions(self.hidden, self.side, grid, device).to(own.device, own.dtype)

    def _check(self, own: Tensor) -> None:
        if own.is_meta or type(own.detach()) is not Tensor:
            return
        if not torch.allclose(own, self._computed(None, own, "cpu"), rtol=0, atol=_NEAR):
            raise ValueError(
                "x must have the network's own size: its positions (pos_embed) are not the sines "
                "of SiT, which other sizes need"
            )


def _capturing(at: Tensor) -> bool:
    return at.is_cuda and torch.cuda.is_current_stream_capturing()
