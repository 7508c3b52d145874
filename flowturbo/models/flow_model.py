"""The flow model: a predictor, its refiner and its autoencoder, with what they expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowturbo_kernels import use_backend

from ..runtime.cuda_graphs import Captures
from ..runtime.modes import without_autocast
from .not_finite import Dtypes, Noted, checked
from .sit import SiT
from .vae import VAE, decode_noting


class Network(Protocol):
    """A predictor, called without v, or a refiner, called with it.

    x (N, C, H, W), t (N,), y (N,), v like x -> like x.
    """

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class AdaptiveNetwork(Network, Protocol):
    """A network in which time and label enter only by modulations of its layers (adaLN).

    So the modulations can be computed without x.
    """

    @property
    def modulation_width(self) -> int:
        """How many numbers the modulations of one condition are, of all layers together."""
        ...

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (S,) and y (N,), every time with every label -> (S, N, D)."""
        ...

    def modulations(self, c: Tensor) -> list[Tensor]:
        """c (..., D) -> (..., chunks * D) for each modulated layer."""
        ...

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        """The network with modulations of R rows -> R rows.

        R may be twice the rows of x, for both halves of guidance.
        """
        ...


@dataclass
class FlowModel:
    """A class-conditional flow model with t = 0 for noise and v = data - noise.

    latent_shape: (C, H, W); (C, T, H, W) for videos.
    null_class: the label of the unconditional half; None if the model has none and can't be guided.
    guidance_channels: how many channels guidance acts on by default.
    device, dtype: of the networks' weights.
    """

    predictor: Network
    latent_shape: tuple[int, ...]
    num_classes: int
    null_class: int | None
    guidance_channels: int
    device: torch.device
    dtype: torch.dtype
    refiner: Network | None = None
    vae: VAE | None = None
    backend: str = "auto"
    """Which kernels `sample` and `decode` run; see flowturbo_kernels.use_backend."""
    macs: tuple[int, int] | None = None
    """Multiply-accumulates of one predictor and one refiner forward of one sample, if known."""
    shift: float = 1.0
    """Shift of the time grid of plans given as text; see Plan.parse."""
    class_names: tuple[str, ...] | None = None
    """Of all classes, by number, if the model's file names them."""
    captures: Captures = field(default_factory=Captures, init=False, repr=False, compare=False)
    """CUDA graphs of whole runs: `captures.limit` is their largest number, `captures.clear()`
    releases their memory. See flowturbo.summary.
    """

    def guided(self, guidance: float) -> bool:
        """Whether guidance at this scale evaluates both halves, which it does unless it is 1.

        Raises ValueError if the model can't be guided.
        """
        if guidance != 1 and self.null_class is None:
            raise ValueError(
                f"guidance={guidance} needs a model with a null class, and this one has none: "
                "give guidance=1"
            )
        return guidance != 1

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) -> images (N, height, width, 3), uint8, on the model's device; or
        (N, C, T, H, W) -> videos (N, frames, height, width, 3).

        Raises ValueError if the model has no vae, and NotFiniteError, a FloatingPointError, which
        names the images, for latents or pixels with NaN or infinity; in a capture of one's own
        that can't be read.
        """
        images, noted = self.decode_noting(latents)
        return checked(noted, images, self.dtypes)

    @property
    def dtypes(self) -> Dtypes:
        """Of the networks and of the autoencoder, if it has one."""
        return self.dtype, getattr(self.vae, "dtype", None)

    def decode_noting(self, latents: Tensor) -> tuple[Tensor, Noted]:
        """`decode` without waiting for the device -> images, what was noted of each."""
        if self.vae is None:
            raise ValueError(
                "decode needs a vae: give one to load, such as vae='stabilityai/sd-vae-ft-ema'"
            )
        with use_backend(self.backend), without_autocast(self.device):
            return decode_noting(self.vae, latents.to(self.device))


class ReversedTime(nn.Module):
    """A predictor whose time runs from data (0) to noise (1), such as REPA's.

    In our convention its velocity is -v(x, 1 - t).
    """

    def __init__(self, network: SiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        return -self.network(x, 1 - t, y)

    @property
    def modulation_width(self) -> int:
        return self.network.modulation_width

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return self.network.condition(1 - t, y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        return self.network.modulations(c)

    def modulations_at(
        self, times: Sequence[float], labels: Tensor, null: int | None
    ) -> list[Tensor]:
        return self.network.modulations_at([1 - t for t in times], labels, null)

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        return -self.network.evaluate(x, modulations)

    def evaluate_and_move(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.network.evaluate_and_move(*args, **{**kwargs, "sign": -1.0})


VelocityFunction = Callable[..., Tensor]
"""v(x, t, **cond): x (N, ...), t a scalar tensor in [0, 1] -> the velocity, of x's shape."""
