"""Loading a flow model from files, modules or by a bundled name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from flowturbo_kernels import BACKENDS, BackendError, unavailable

from ..runtime.device import choose_device
from ..storage.files import CheckpointError
from ..storage.provenance import file_digest
from .checkpoint import CONVENTIONS, Checkpoint, load_sit
from .flow_model import FlowModel, Network, ReversedTime
from .sit import SiT
from .vae import VAE, load_vae


def model_digests(
    model: str | os.PathLike[str], refiner: str | os.PathLike[str] | None
) -> dict[str, str | None]:
    """SHA-256 of a model's files; a bundled model brings its own refiner."""
    bundled = MODELS.get(str(model))
    return {
        "predictor_sha256": file_digest(bundled.predictor if bundled else model),
        "refiner_sha256": file_digest(bundled.refiner if bundled and refiner is None else refiner),
    }


_BUNDLED = Path(__file__).parent.parent / "bundled"


@dataclass(frozen=True)
class Bundled:
    """A model that ships in the package."""

    predictor: Path
    refiner: Path


MODELS: dict[str, Bundled] = {
    "digits": Bundled(_BUNDLED / "digits.safetensors", _BUNDLED / "digits-refiner.safetensors"),
}


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

    predictor, refiner: a .pt, .pth or .safetensors file with SiT's keys (see checkpoint.load_sit),
        a bundled name ("digits", which brings its refiner), or a SiT, which is moved and cast in
        place. The refiner must read and return latents of the predictor's shape.
    vae: a folder or hub name of a diffusers AutoencoderKL (needs the extra "diffusers"), "pixels",
        or an object with decode and encode; None: what the predictor's file names, else no
        decoding.
    heads: attention heads, where the width does not tell (the published widths do).
    device, dtype: None: cuda and bfloat16 where there is a GPU, else cpu and float32.
    backend: which kernels run: "triton", "cuda" (csrc's), "reference" (plain torch), or "auto": the
        environment's FLOWTURBO_BACKEND, else on CUDA the first that can, on the CPU plain torch.
    convention: "repa" for checkpoints with time reversed; "auto" when the file tells.
    quantize: "fp8" for the predictor's products in e4m3, with one scale a row: faster on sm_89 and
        later, and another velocity, by some percent, which `flowturbo bench --quantize fp8`
        measures. A SiT that was given is changed in place.
    Raises CheckpointError for a file that can't be used, ValueError or TypeError for arguments that
    don't fit together, BackendError where the backend asked for can't run on the device.
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
    refiner_model = None
    if refiner is not None:
        refiner_model = _checkpoint(refiner, "refiner", heads, "auto").model
        _check_pair(main.model, refiner_model)
    sit = _aligned(main.model.to(place, dtype))
    if quantize:
        sit.quantize_()
    network: nn.Module = ReversedTime(sit) if main.convention == "repa" else sit
    chosen_vae = vae if vae is not None else main.vae
    if isinstance(chosen_vae, str | os.PathLike):
        chosen_vae = load_vae(chosen_vae, place, dtype)
    # Published scores of SiT guide 3 of 4 channels (public code); REPA's and everyone else's guide
    # all.
    three = config.channels == 4 and main.convention == "sit"
    return FlowModel(
        predictor=cast(Network, network),
        refiner=None
        if refiner_model is None
        else cast(Network, _aligned(refiner_model.to(place, dtype))),
        latent_shape=(config.channels, config.side, config.side),
        num_classes=config.num_classes,
        null_class=config.null_class,
        guidance_channels=3 if three else config.channels,
        device=place,
        dtype=dtype,
        vae=chosen_vae,
        backend=backend,
        macs=(config.macs(), 0 if refiner_model is None else refiner_model.config.macs()),
    )


def _checkpoint(
    source: Source,
    role: Literal["predictor", "refiner"],
    heads: int | None,
    convention: Literal["auto", "sit", "repa"],
) -> Checkpoint:
    if isinstance(source, SiT):
        if source.config.reads_velocity != (role == "refiner"):
            raise ValueError(f"{role} must be a SiT with config.reads_velocity={role == 'refiner'}")
        return Checkpoint(source, "repa" if convention == "repa" else "sit")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"{role} must be a path, a bundled name or a SiT, got {type(source).__name__}"
        )
    if isinstance(source, str) and source not in MODELS and not Path(source).suffix:
        raise CheckpointError(
            f"{role} {source!r} is neither a bundled model ({', '.join(MODELS)}) nor a "
            ".safetensors, .pt or .pth file"
        )
    if isinstance(source, str) and source in MODELS:
        source = MODELS[source].refiner
    return load_sit(source, role, heads=heads, convention=convention)


def _aligned(sit: SiT) -> SiT:
    """The network, with weights on the CPU where torch would put them, at multiples of 64 bytes.

    safetensors leaves them where they stand in the file, and there products round otherwise (5e-7
    was measured): the same weights from two files would give two images.
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
            raise ValueError(
                f"refiner does not fit the predictor: it has {what} {theirs}, the predictor {ours}"
            )
