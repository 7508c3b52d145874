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
from .checkpoint import CONVENTIONS, Checkpoint, load_sit
from .sit import SiT
from .vae import VAE, load_vae

_BUNDLED = Path(__file__).parent.parent / "bundled"


@dataclass(frozen=True)
class Bundled:
    """A model that ships in the package."""

    predictor: Path
    refiner: Path


MODELS: dict[str, Bundled] = {
    "digits": Bundled(_BUNDLED / "digits.safetensors", _BUNDLED / "digits-refiner.safetensors"),
}


class Network(Protocol):
    """A predictor, called without v, or a refiner, called with it. x (N, C, H, W), t (N,), y (N,), v like x -> like x."""

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
    vae: VAE | None = None
    backend: str = "auto"
    """Which kernels `sample` and `decode` run: see flowturbo_kernels.use_backend."""
    macs: tuple[int, int] | None = None
    """Multiply-accumulates of one predictor and one refiner forward of one sample, where they are known."""
    shift: float = 1.0
    """Of the time grid on which plans given as text run: see Plan.parse."""
    captures: Captures = field(default_factory=Captures, init=False, repr=False, compare=False)
    """CUDA graphs of whole runs; `captures.limit` bounds them, `captures.clear()` gives up their memory. See flowturbo.summary."""

    def guided(self, guidance: float) -> bool:
        """Whether this scale runs both halves. ValueError where the model can't be guided."""
        if guidance != 1 and self.null_class is None:
            raise ValueError(f"guidance={guidance} needs a model with a null class, and this one has none")
        return guidance != 1

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
) -> FlowModel:
    """A flow model from checkpoints.

    predictor, refiner: a .pt, .pth or .safetensors file with SiT's keys (see checkpoint.load_sit), a bundled name ("digits", which
        brings its refiner), or a SiT, which is moved and cast in place. The refiner must read and return latents of the
        predictor's shape.
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
        predictor, refiner = bundled.predictor, refiner or bundled.refiner
    main = _checkpoint(predictor, "predictor", heads, convention)
    config = main.model.config
    side = None if refiner is None else _checkpoint(refiner, "refiner", heads, "auto").model
    if side is not None:
        _check_pair(main.model, side)
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
        refiner=None if side is None else cast(Network, _aligned(side.to(place, dtype))),
        latent_shape=(config.channels, config.side, config.side),
        num_classes=config.num_classes,
        null_class=config.null_class,
        guidance_channels=3 if three else config.channels,
        device=place,
        dtype=dtype,
        vae=chosen_vae,
        backend=backend,
        macs=(config.macs(), 0 if side is None else side.config.macs()),
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


def _checkpoint(
    source: Source, role: Literal["predictor", "refiner"], heads: int | None, convention: Literal["auto", "sit", "repa"]
) -> Checkpoint:
    if isinstance(source, SiT):
        if source.config.reads_velocity != (role == "refiner"):
            raise ValueError(f"{role} must be a SiT with config.reads_velocity={role == 'refiner'}")
        return Checkpoint(source, "repa" if convention == "repa" else "sit")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{role} must be a path, a bundled name or a SiT, got {type(source).__name__}")
    if isinstance(source, str) and source not in MODELS and not Path(source).suffix:
        raise CheckpointError(
            f"{role} {source!r} is neither a bundled model ({', '.join(MODELS)}) nor a .safetensors, .pt or .pth file"
        )
    if isinstance(source, str) and source in MODELS:
        source = MODELS[source].refiner
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


def _check_pair(predictor: SiT, refiner: SiT) -> None:
    p, r = predictor.config, refiner.config
    for what, ours, theirs in (
        ("latent channels", p.channels, r.channels),
        ("a latent side", p.side, r.side),
        ("classes", p.num_classes, r.num_classes),
    ):
        if ours != theirs:
            raise ValueError(f"refiner does not fit the predictor: it has {what} {theirs}, the predictor {ours}")


VelocityFunction = Callable[..., Tensor]
"""v(x, t, **cond): x (N, ...), t a scalar tensor in [0, 1] -> the velocity, of x's shape."""
