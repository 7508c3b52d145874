"""What the families of diffusers' networks have in common: a network with a prompt, in our time and
sign.

Each family is a file of its own; `prompt_kinds.KINDS` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conditions = Mapping[str, Tensor]
"""The inputs of a network besides x and t: embeds (N, L, D) and, for some kinds of network, pooled
(N, P), embedded_guidance (N,), and lengths (N,) int64 on the CPU, the tokens of each prompt.
"""

Labels = Tensor | Conditions
"""Class numbers (N,), or conditions."""

GuidanceStyle = Literal["halves", "embedded", "none"]


class Kind:
    """How one class of diffusers networks is called.

    sign: of its output relative to our velocity, data - noise.
    reads: the conditions it must have.
    lengths: whether prompts of one batch may differ in length.
    spatial: the axes of a latent without its channels: 2 for images, 3 for videos.
    factor: pixels of an image side per unit of a latent side, where the VAE does not say.
    input, time: the names of these arguments of the network.
    channel_axis: of the pipeline's latents, as the network gets them.
    """

    sign = -1
    reads: tuple[str, ...] = ("embeds",)
    lengths = False
    spatial = 2
    factor = 8
    input, time = "hidden_states", "timestep"
    channel_axis = 1
    rescales = False
    """Whether the pipeline rescales the guided velocity, as `rescale` does."""

    def channels(self, config: Any) -> int:
        """Of the latents."""
        return int(config.in_channels)

    def outputs(self, config: Any) -> int:
        """The channels of the network's output, counted as its in_channels are."""
        return int(config.get("out_channels") or config.in_channels)

    def multiple(self, config: Any) -> int:
        """The sides of the latents must be multiples of this."""
        return 2

    def sides(self, config: Any) -> tuple[int, int]:
        """Height and width of the latents by default."""
        return 1024 // self.factor, 1024 // self.factor

    def longest(self, config: Any) -> int:
        """The longest side of the latents."""
        return 2**20 * self.multiple(config)

    def timestep(self, noise_level: Any) -> Any:
        """What the network is given as time."""
        return 1000 * noise_level

    def call(self, module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
        """The network's output, (N, C, H, W) or (N, C, T, H, W), at x with that many or twice as
        many channels.
        """
        raise NotImplementedError

    def encode(
        self, pipe: Any, texts: list[str], negative: list[str] | None, device: Any
    ) -> dict[str, Tensor]:
        """The encodings of texts by a pipeline, by the names of conditions and negative_...

        negative: None: no second half is encoded.
        """
        raise NotImplementedError

    def guidance(self, module: Any, pipe: Any = None) -> GuidanceStyle:
        """How the network is guided: see PromptModel."""
        return "halves"

    def shift(self, scheduler: Any, tokens: int) -> float | None:
        """The shift of the time grid for images of so many tokens; None: as the scheduler says."""
        return None

    def rescale(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """The guided velocity, rescaled by the conditional one; both like x."""
        return guided

    def refiner(self, config: dict[str, Any], depth: int) -> dict[str, Any]:
        """The configuration of a refiner, besides its channels."""
        return {"num_layers": depth}

    def last_layer(self, refiner: Any) -> nn.Module:
        """The layer that makes a refiner's output."""
        return refiner.proj_out

    # Beside a pipeline, whose own calls are followed:

    def beside(self, recorded: Any, x: Tensor, v: Tensor) -> Any:
        """x and v in the form of the input of a recorded call, with its number of rows.

        x, v: the pipeline's latents. Raises ValueError if the input held more than the latents.
        """
        halves = len(recorded) // len(x)
        if not halves or tuple(recorded.shape) != (halves * len(x), *x.shape[1:]):
            raise ValueError(
                f"a refiner reads latents of shape {tuple(x.shape)} alone, but the pipeline gave "
                f"its transformer {tuple(recorded.shape)}: it concatenates conditions"
            )
        joined = torch.cat([x, v], dim=self.channel_axis)
        return joined.repeat(halves, *[1] * (x.ndim - 1)).to(recorded.dtype)

    def output(self, result: Any) -> Tensor:
        """The network's output as the pipeline keeps its latents.

        result: what the network returned, as a tuple or an output of diffusers.
        """
        return result[0]

    def rescale_latents(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """`rescale` on latents as the pipeline keeps them."""
        return self.rescale(guided, conditional)


def type_name(module: Any) -> str:
    """The class name of a network, or of the one that torch.compile wrapped."""
    return type(original(module)).__name__


def original(module: Any) -> Any:
    """The network itself, where torch.compile wrapped it."""
    return vars(module).get("_modules", {}).get("_orig_mod", module) if module is not None else None


TOKENS = 512
"""The longest prompt of the kinds with lengths, as in their pipelines' own calls."""


def padded(embeds: Tensor, length: int) -> Tensor:
    """embeds (N, L, D), with zeros to the length (N, length, D)."""
    return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def with_lengths(embeds: Sequence[Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Encoded prompts (L_i, D) of any lengths -> embeds, padded with zeros, and lengths."""
    longest = max(map(len, embeds))
    return {
        f"{prefix}embeds": torch.cat([padded(e[None], longest) for e in embeds]),
        f"{prefix}lengths": torch.tensor([len(e) for e in embeds], device="cpu"),
    }


def both_halves(first: Conditions, second: Conditions) -> dict[str, Tensor]:
    """The rows of `first`, then those of `second`, whose prompts may be of another length."""
    longest = max(first["embeds"].shape[1], second["embeds"].shape[1])
    if "lengths" in first:
        first, second = (
            {**half, "embeds": padded(half["embeds"], longest)} for half in (first, second)
        )
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def lengths_of(c: Conditions) -> list[int]:
    """How many tokens each prompt has."""
    embeds = c["embeds"]
    if "lengths" not in c:
        return [embeds.shape[1]] * len(embeds)
    return [int(length) for length in c["lengths"].tolist()]


def packed(x: Tensor) -> Tensor:
    """FLUX's tokens, 2 x 2 patches: (N, C, H, W) -> (N, H/2 * W/2, 4C)."""
    N, C, H, W = x.shape
    return (
        x.view(N, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(N, H * W // 4, 4 * C)
    )


def unpacked(tokens: Tensor, H: int, W: int) -> Tensor:
    """The inverse of `packed`."""
    N, _, channels = tokens.shape
    return (
        tokens.view(N, H // 2, W // 2, channels // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(N, channels // 4, H, W)
    )
