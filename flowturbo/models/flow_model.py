"""The flow model: a predictor, its refiner and its autoencoder, with what they expect."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowturbo_kernels import use_backend

from ..checks import listed, positive
from ..runtime.cuda_graphs import Captures
from ..runtime.modes import without_autocast
from ..solver.plan import Plan
from ..solver.stages import StagedPlan
from .class_names import numbered
from .model_plans import find_plan
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
    class_names: tuple[str, ...] | None = field(default=None, kw_only=True)
    """Of all classes, by number, if the model's file names them."""
    sides: tuple[int, ...] = field(default=(), kw_only=True)
    """Heights and widths of latents that a class-conditional model was trained on, its own among
    them: stages may have these. To try another one: `model.sides += (8,)`.
    """
    drawn: tuple[int, ...] | None = field(default=None, kw_only=True)
    """(C, H, W) of the noise that a seed draws, which `resized_noise` then makes as large as the
    latents; None: that of the latents.
    """
    plans: Mapping[str, Plan | StagedPlan] = field(default_factory=dict, kw_only=True)
    """Those that the model's file holds, by name; `sample` and commands take these names."""
    guidance: float | None = field(default=None, kw_only=True)
    """The scale that the model's file recommends, if it does; commands start from it."""
    license: str | None = field(default=None, kw_only=True)
    """Under which the weights may be used, if the model's file names it."""
    captures: Captures = field(default_factory=Captures, init=False, repr=False, compare=False)
    """CUDA graphs of whole runs: `captures.limit` is their largest number, `captures.clear()`
    releases their memory. See flowturbo.summary.
    """

    def numbered(self, labels: Any) -> Any:
        """Labels with class numbers in place of names: "cat", or a list, tuple or array.

        Raises ValueError for a name that no class has, with those near it.
        """
        return numbered(labels, self.class_names)

    def class_name(self, label: int | str) -> str | None:
        """What the model's file calls the class of this number; None for a prompt, the null class,
        and if the file names no classes.
        """
        names = self.class_names or ()
        return names[label] if isinstance(label, int) and 0 <= label < len(names) else None

    def find_plan(self, plan: str | Plan | StagedPlan) -> Plan | StagedPlan:
        """A plan of `plans` by its name, or what `sample` makes of any other text.

        Raises ValueError for a text that is neither, with the names.
        """
        return find_plan(plan, self.plans, self.shift)

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

    def resized(self, image_size: int | tuple[int, int]) -> FlowModel:
        """The model with images of another size; networks and graphs are the same.

        Seeds give images of the same composition as at the model's own size: see `resized_noise`.
        image_size: height and width, or one number for both, in pixels; of a model without a vae,
            of its latents. Of SiTs any multiple of a patch.
        Warns of sizes that the model was not trained on, at which images may be poor. Raises
        ValueError for those that it can't have.
        """
        pair = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
        if len(pair) != 2:
            raise ValueError(f"image_size must be a number or two, got {image_size!r}")
        factor = 1 if self.vae is None else self.vae.factor
        step = self.multiple * factor
        for side in pair:
            if positive("image_size", side) % step:
                raise ValueError(
                    f"image_size must be a multiple of {step} for this model, got {image_size!r}"
                )
        height, width = (side // factor for side in pair)
        if not self.trained_at(height, width):
            if not all(isinstance(network, SiT) for network in self._networks):
                raise ValueError(
                    "image_size must be the model's own for a network that is no SiT, unless sides "
                    f"names it, got {image_size!r}"
                )
            known = listed(sorted({side * factor for side in (*self.sides, *self._own[1:])}))
            warnings.warn(
                f"image_size {image_size!r} is none that the model was trained on ({known}): its "
                "images may be poor",
                stacklevel=2,
            )
        resized = self.at_size((height, width))
        if resized is self:
            return self
        if self.macs and all(isinstance(network, SiT) for network in self._networks):
            configs = [network.config for network in self._networks]  # type: ignore[attr-defined]
            each = [config.macs(height * width // config.patch**2) for config in configs]
            resized.macs = each[0], sum(each[1:])
        resized.drawn = None if resized.latent_shape == self._own else self._own
        return resized

    def at_size(self, size: tuple[int, ...]) -> FlowModel:
        """The model with latents of another size, unchecked, with the same networks and graphs."""
        if self.latent_shape[1:] == size:
            return self
        resized = replace(self, latent_shape=(self.latent_shape[0], *size))
        resized.captures = self.captures
        return resized

    def trained_at(self, height: int, width: int) -> bool:
        """Whether latents of this size are its own or were trained on, as `sides` says."""
        return (height, width) == self._own[1:] or (height == width and height in self.sides)

    def shift_at(self, height: int, width: int) -> float:
        """The shift of the time grid for latents of another size, in proportion to the sides, as in
        SD3's paper (arXiv 2403.03206, section 5.3.2).
        """
        H, W = self.latent_shape[-2:]
        return self.shift * math.sqrt(height * width / (H * W))

    @property
    def _own(self) -> tuple[int, ...]:
        """The latent_shape of the model as it was loaded."""
        return self.latent_shape if self.drawn is None else self.drawn

    @property
    def multiple(self) -> int:
        """Of which the sides of latents must be multiples: the patch of SiTs."""
        patches = [net.config.patch for net in self._networks if isinstance(net, SiT)]
        return math.lcm(*patches)

    @property
    def _networks(self) -> list[object]:
        """The predictor and the refiner, if there is one, without reversal of time."""
        networks = [self.predictor, *([] if self.refiner is None else [self.refiner])]
        return [net.network if isinstance(net, ReversedTime) else net for net in networks]

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
