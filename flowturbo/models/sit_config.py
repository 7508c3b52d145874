"""The sizes of a SiT: named, and inferred from the tensors of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..checks import positive

TIME_FEATURES = 256


@dataclass(frozen=True)
class SiTConfig:
    """The sizes of a SiT.

    hidden: D, the width. depth: number of blocks. heads: of attention. patch: side of a patch.
    side: height and width of the latent.
    channels: of the latent and of the velocity.
    num_classes: without the null class.
    learned_sigma: the final layer has twice the channels, of which the second half is not used.
    reads_velocity: the input is x and a velocity, as a refiner's is.
    null_row: the label table has a last row for the null class, without which there is no guidance.
    sides: further heights and widths of latents that it was trained on.
    Raises ValueError or TypeError for sizes that don't fit together.
    """

    hidden: int
    depth: int
    heads: int
    patch: int
    side: int
    channels: int = 4
    num_classes: int = 1000
    learned_sigma: bool = True
    reads_velocity: bool = False
    null_row: bool = True
    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("hidden", "depth", "heads", "patch", "side", "channels", "num_classes"):
            positive(name, getattr(self, name))
        for name in ("learned_sigma", "reads_velocity", "null_row"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.hidden % self.heads:
            raise ValueError(f"heads must divide the hidden size {self.hidden}, got {self.heads}")
        if self.hidden % 4:
            raise ValueError(
                f"hidden must be a multiple of 4 (2-D sine and cosine positions), got {self.hidden}"
            )
        if self.side % self.patch:
            raise ValueError(f"patch must divide the latent side {self.side}, got {self.patch}")
        self._check_sides()

    def _check_sides(self) -> None:
        if not isinstance(self.sides, list | tuple):
            raise TypeError(f"sides must be a tuple of whole numbers, got {self.sides!r}")
        object.__setattr__(self, "sides", tuple(self.sides))
        for side in self.sides:
            if positive("sides", side) % self.patch:
                raise ValueError(f"sides must be multiples of the patch {self.patch}, got {side}")
        if len({self.side, *self.sides}) <= len(self.sides):
            raise ValueError(
                f"sides must differ from each other and from side, {self.side}, got {self.sides}"
            )

    @property
    def in_channels(self) -> int:
        """Channels of the input: those of x, and of v for a refiner."""
        return self.channels * (2 if self.reads_velocity else 1)

    @property
    def out_channels(self) -> int:
        """Channels of the final layer, with those of a learned sigma."""
        return self.channels * (2 if self.learned_sigma else 1)

    @property
    def tokens(self) -> int:
        """T, the number of patches."""
        return (self.side // self.patch) ** 2

    @property
    def label_rows(self) -> int:
        """Rows of the label table: the classes, and the null class if there is one."""
        return self.num_classes + self.null_row

    @property
    def null_class(self) -> int | None:
        """The label of the unconditional half: the last row of the label table; None: no such."""
        return self.num_classes if self.null_row else None

    def refiner(self, depth: int = 1) -> SiTConfig:
        """The refiner of this predictor: the same trunk, reading x and v (paper section 3.2).

        depth: its number of blocks. Its further sides are for its own training to say.
        """
        return replace(self, depth=depth, reads_velocity=True, sides=())

    def trained_at(self, height: int, width: int) -> bool:
        """Whether latents of this size were trained on."""
        return height == width and height in (self.side, *self.sides)

    def macs(self, tokens: int | None = None) -> int:
        """Multiply-accumulates of all matrix products in one forward of one sample.

        tokens: None: as many as latents of its own size have.
        """
        return self.trunk_macs(tokens) + self.conditioning_macs()

    def trunk_macs(self, tokens: int | None = None) -> int:
        """Those of the layers that read x."""
        D, T = self.hidden, self.tokens if tokens is None else tokens
        ends = T * self.patch**2 * (self.in_channels + self.out_channels) * D
        return self.depth * (T * 12 * D * D + 2 * T * T * D) + ends

    def conditioning_macs(self) -> int:
        """Those of the layers that read only time and label."""
        D = self.hidden
        return (6 * self.depth + 2) * D * D + TIME_FEATURES * D + D * D


SIT_SIZES: dict[str, dict[str, int]] = {
    "S": dict(hidden=384, depth=12, heads=6),
    "B": dict(hidden=768, depth=12, heads=12),
    "L": dict(hidden=1024, depth=24, heads=16),
    "XL": dict(hidden=1152, depth=28, heads=16),
}
SIT_CONFIGS: dict[str, SiTConfig] = {
    f"SiT-{name}/{patch}": SiTConfig(patch=patch, side=32, **sizes)  # type: ignore[arg-type]
    for name, sizes in SIT_SIZES.items()
    for patch in (2, 4, 8)
}


_BLOCK = re.compile(r"blocks\.([0-9]+)\.")


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    """One more than the largest block number, but at most twice the number of blocks.

    So a stray number does not make a giant model, and missing blocks show when keys are compared.
    """
    numbers = set()
    for name in state:
        if name.startswith("blocks."):
            block = _BLOCK.match(name)
            if block is None:
                raise ValueError(f"not a key of a SiT: {name} (blocks are named blocks.<number>.)")
            numbers.add(int(block[1]))
    return min(1 + max(numbers, default=-1), 2 * len(numbers))


def config_from_state(
    state: Mapping[str, Tensor],
    *,
    reads_velocity: bool = False,
    heads: int | None = None,
    null_row: bool = True,
) -> SiTConfig:
    """The sizes of a SiT, inferred from the tensors of its checkpoint.

    state: tensors by SiT's names, unwrapped.
    heads: None: those of the published model of that width.
    null_row: whether the label table's last row is the null class, which its shape does not tell.
    Raises KeyError for a missing tensor, and ValueError where the shapes fit no SiT or the number
    of heads is unknown.
    """
    projection, table = state["x_embedder.proj.weight"], state["y_embedder.embedding_table.weight"]
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise ValueError(
            f"x_embedder.proj.weight must have shape (D, C, p, p), got {tuple(projection.shape)}"
        )
    for name, ndim in (
        ("pos_embed", 3),
        ("y_embedder.embedding_table.weight", 2),
        ("final_layer.linear.weight", 2),
    ):
        if state[name].ndim != ndim:
            raise ValueError(
                f"{name} must have {ndim} dimensions, got shape {tuple(state[name].shape)}"
            )
    hidden, in_channels, patch, _ = projection.shape
    depth = _count_blocks(state)
    tokens = state["pos_embed"].shape[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(f"pos_embed must hold a square number of tokens, got {tokens}")
    if reads_velocity and in_channels % 2:
        raise ValueError(f"a refiner must have an even number of input channels, got {in_channels}")
    channels = in_channels // 2 if reads_velocity else in_channels
    outputs = state["final_layer.linear.weight"].shape[0]
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        raise ValueError(
            f"final_layer.linear.weight must have {patch**2 * channels} or "
            f"{2 * patch**2 * channels} rows "
            f"for patch {patch} and {channels} channels, got {outputs}"
        )
    if heads is None:
        published = {sizes["hidden"]: sizes["heads"] for sizes in SIT_SIZES.values()}
        if hidden not in published:
            raise ValueError(
                f"heads must be given: width {hidden} is none of the published {sorted(published)}"
            )
        heads = published[hidden]
    return SiTConfig(
        hidden=hidden,
        depth=depth,
        heads=heads,
        patch=patch,
        side=grid * patch,
        channels=channels,
        num_classes=table.shape[0] - null_row,
        learned_sigma=outputs == 2 * patch**2 * channels,
        reads_velocity=reads_velocity,
        null_row=null_row,
    )
