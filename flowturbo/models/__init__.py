"""FlowModel: networks, label space and codec together; `load` makes one from files. A bundled model is an entry in MODELS."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from flowturbo_kernels import BACKENDS, BackendError, unavailable, use_backend

from ..files import CheckpointError
from ..graph import Captures
from ..plan import Part, Plan
from .checkpoint import CONVENTIONS, Checkpoint, load_sit
from .sit import SiT
from .vae import VAE, load_vae

_BUNDLED = Path(__file__).parent.parent / "bundled"


@dataclass(frozen=True)
class Bundled:
    """A model that ships in the package."""

    predictor: Path
    refiner: Path
    extrapolator: Path


MODELS: dict[str, Bundled] = {
    "digits": Bundled(*(_BUNDLED / f"digits{part}.safetensors" for part in ("", "-refiner", "-extrapolator"))),
}


class Network(Protocol):
    """A predictor, called without v, or a refiner, called with it. x (N, C, H, W), t (N,), y (N,), v like x -> like x.

    An extrapolating refiner's v has 2C channels: the last velocity, and what the line through the last two adds to it until t.
    """

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class AdaptiveNetwork(Network, Protocol):
    """A network that time and label enter only by modulations of its layers, so that these can be made apart from x."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (S,) and y (N,), every time with every label -> (S, N, D)."""
        ...

    def modulations(self, c: Tensor) -> list[Tensor]:
        """c (..., D) -> for every layer that is modulated (..., chunks * D)."""
        ...

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        """The network on given modulations, whose R rows may be twice those of x: both halves of guidance -> R rows."""
        ...


@dataclass
class FlowModel:
    """What `sample` needs to know of a class-conditional flow model, in our convention: t = 0 is noise, v = data - noise.

    latent_shape: (C, H, W). null_class: the label of the unconditional half, None if the model has none, which rules guidance out.
    guidance_channels: how many channels guidance acts on unless a call says otherwise.
    """

    predictor: Network
    latent_shape: tuple[int, int, int]
    num_classes: int
    null_class: int | None
    guidance_channels: int
    device: torch.device
    dtype: torch.dtype
    refiner: Network | None = None
    extrapolator: Network | None = None
    """The extrapolating refiner, of X steps."""
    vae: VAE | None = None
    backend: str = "auto"
    """Which kernels `sample` and `decode` run: see flowturbo_kernels.use_backend."""
    macs: tuple[int, int, int] | None = None
    """Multiply-accumulates of one forward of one sample of predictor, refiner and extrapolator, where they are known."""
    shift: float = 1.0
    """Of the time grid on which plans given as text run: see Plan.parse."""
    captures: Captures = field(default_factory=Captures, init=False, repr=False, compare=False)
    """CUDA graphs of whole runs; `captures.limit` bounds them, `captures.clear()` gives up their memory. See flowturbo.summary."""

    def guided(self, guidance: float) -> bool:
        """Whether this scale runs both halves. ValueError where the model can't be guided."""
        if guidance != 1 and self.null_class is None:
            raise ValueError(f"guidance={guidance} needs a model with a null class, and this one has none")
        return guidance != 1

    def networks(self) -> list[Network]:
        """Predictor, refiner and extrapolator, as far as they are there."""
        return [network for network in (self.predictor, self.refiner, self.extrapolator) if network is not None]

    def allow(self, plan: Plan) -> None:
        """ValueError where the plan has steps of a network that is not there."""
        for part, calls, what in (
            ("refiner", plan.cost.refiner, "refiner steps"),
            ("extrapolator", plan.cost.extrapolator, "X steps, of an extrapolating refiner"),
        ):
            if calls and getattr(self, part) is None:
                raise ValueError(f"plan {plan} has {what}, but the model was loaded without {part}=")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (N, C, H, W) -> images (N, height, width, 3), uint8, on the model's device. ValueError without a vae."""
        if self.vae is None:
            raise ValueError("decode needs a vae: give one to load, such as vae='stabilityai/sd-vae-ft-ema'")
        with use_backend(self.backend):
            return self.vae.decode(latents.to(self.device))


class ReversedTime(nn.Module):
    """A predictor whose time runs from data (0) to noise (1), as REPA's, in our convention: -v(x, 1 - t)."""

    def __init__(self, network: SiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        return -self.network(x, 1 - t, y)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return self.network.condition(1 - t, y)

    def modulations(self, c: Tensor) -> list[Tensor]:
        return self.network.modulations(c)

    def evaluate(self, x: Tensor, modulations: Sequence[Tensor], v: Tensor | None = None) -> Tensor:
        return -self.network.evaluate(x, modulations)


Source = str | os.PathLike[str] | SiT


def load(
    predictor: Source,
    refiner: Source | None = None,
    vae: str | os.PathLike[str] | VAE | None = None,
    *,
    heads: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: Literal["auto", "reference", "triton", "cuda"] = "auto",
    convention: Literal["auto", "sit", "repa"] = "auto",
    quantize: Literal["fp8"] | None = None,
    extrapolator: Source | None = None,
) -> FlowModel:
    """A flow model from checkpoints.

    predictor, refiner, extrapolator: a .pt, .pth or .safetensors file with SiT's keys (see checkpoint.load_sit), a bundled name
        ("digits", which brings its refiners), or a SiT, which is moved and cast in place. Refiners must read and return latents of
        the predictor's shape; extrapolator is the extrapolating one, of X steps.
    vae: a folder or hub name of a diffusers AutoencoderKL (needs the extra "diffusers"), "pixels", or an object with decode and
        encode; None: what the predictor's file names, else no decoding.
    heads: attention heads, where the width does not tell (the published widths do).
    device, dtype: None: cuda and bfloat16 where there is a GPU, else cpu and float32.
    backend: which kernels run: "triton", "cuda" (csrc's), "reference" (plain torch), or "auto": the environment's
        FLOWTURBO_BACKEND, else on CUDA the first that can, on the CPU plain torch.
    convention: "repa" for checkpoints with time reversed; "auto" when the file tells.
    quantize: "fp8" for the predictor's products in e4m3, with one scale a row: faster on sm_89 and later, and another velocity, by
        some percent, which `flowturbo bench --quantize fp8` measures. A SiT that was given is changed in place.
    Raises CheckpointError for a file that can't be used, ValueError or TypeError for arguments that don't fit together,
    BackendError where the backend asked for can't run on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if convention not in ("auto", *CONVENTIONS):
        raise ValueError(f"convention must be 'auto', 'sit' or 'repa', got {convention!r}")
    if quantize not in (None, "fp8"):
        raise ValueError(f"quantize must be 'fp8' or None, got {quantize!r}")
    place = choose_device(device)
    if quantize and place.type == "cuda" and torch.cuda.get_device_capability(place) < (8, 9):
        raise ValueError("quantize='fp8' needs a GPU of sm_89 or later")
    if backend in ("triton", "cuda") and (reason := unavailable(backend, place)):
        raise BackendError(f"backend {backend!r} was asked for, but: {reason}")
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype!r}")
    if isinstance(predictor, str) and predictor in MODELS:
        bundled = MODELS[predictor]
        predictor, refiner, extrapolator = bundled.predictor, refiner or bundled.refiner, extrapolator or bundled.extrapolator
    main = _checkpoint(predictor, "predictor", heads, convention)
    config = main.model.config

    def side(source: Source | None, role: Part) -> SiT | None:
        if source is None:
            return None
        return _aligned(_fitting(main.model, _checkpoint(source, role, heads, "auto").model, role).to(place, dtype))

    sides = side(refiner, "refiner"), side(extrapolator, "extrapolator")
    sit = _aligned(main.model.to(place, dtype))
    if quantize:
        sit.quantize_()
    network: nn.Module = ReversedTime(sit) if main.convention == "repa" else sit
    chosen_vae = vae if vae is not None else main.vae
    if isinstance(chosen_vae, str | os.PathLike):
        chosen_vae = load_vae(chosen_vae, place, dtype)
    # Published scores of SiT guide 3 of 4 channels (public code); REPA's and everyone else's guide all.
    three = config.channels == 4 and main.convention == "sit"
    return FlowModel(
        predictor=cast(Network, network),
        refiner=cast(Network | None, sides[0]),
        extrapolator=cast(Network | None, sides[1]),
        latent_shape=(config.channels, config.side, config.side),
        num_classes=config.num_classes,
        null_class=config.null_class,
        guidance_channels=3 if three else config.channels,
        device=place,
        dtype=dtype,
        vae=chosen_vae,
        backend=backend,
        macs=(config.macs(), _macs(sides[0]), _macs(sides[1])),
    )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. ValueError for a name that is none and for CUDA that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch such as 'cuda' or 'cpu', got {device!r}: {error}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) sees no CUDA device")
    return place


def _checkpoint(source: Source, role: Part, heads: int | None, convention: Literal["auto", "sit", "repa"]) -> Checkpoint:
    if isinstance(source, SiT):
        if source.config.role != role:
            raise ValueError(f"{role} must be a SiT of that role, got one whose config makes it a {source.config.role}")
        return Checkpoint(source, "repa" if convention == "repa" else "sit")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{role} must be a path, a bundled name or a SiT, got {type(source).__name__}")
    if isinstance(source, str) and source not in MODELS and not Path(source).suffix:
        raise CheckpointError(
            f"{role} {source!r} is neither a bundled model ({', '.join(MODELS)}) nor a .safetensors, .pt or .pth file"
        )
    if isinstance(source, str) and source in MODELS:
        source = cast(Path, getattr(MODELS[source], role))
    return load_sit(source, role, heads=heads, convention=convention)


def _aligned(sit: SiT) -> SiT:
    """The network, with weights on the CPU where torch would put them, at multiples of 64 bytes.

    safetensors leaves them where they stand in the file, and there products round otherwise (5e-7 was measured): the same weights
    from two files would give two images.
    """
    for tensor in [*sit.parameters(), *sit.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return sit


def _macs(network: SiT | None) -> int:
    return 0 if network is None else network.config.macs()


def _fitting(predictor: SiT, refiner: SiT, role: Part) -> SiT:
    """The refiner, if it fits."""
    p, r = predictor.config, refiner.config
    for what, ours, theirs in (
        ("latent channels", p.channels, r.channels),
        ("a latent side", p.side, r.side),
        ("classes", p.num_classes, r.num_classes),
    ):
        if ours != theirs:
            raise ValueError(f"{role} does not fit the predictor: it has {what} {theirs}, the predictor {ours}")
    return refiner


VelocityFunction = Callable[..., Tensor]
"""v(x, t, **cond): x (N, ...), t a scalar tensor in [0, 1] -> the velocity, of x's shape."""
