"""Flow models from files, from modules, and by the name of a bundled model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from flowturbo_kernels import BACKENDS, BackendError, unavailable

from ..runtime.cpu_dtype import choose_dtype, warn_if_slow
from ..runtime.device import choose_device
from ..storage.files import CheckpointError
from .bundled import MODELS, files_of
from .checkpoint import CONVENTIONS, Checkpoint, load_sit
from .finite_weights import check_finite
from .flow_model import FlowModel, Network, ReversedTime
from .label_table import check_null_class
from .model_plans import checked_plans
from .sit import SiT
from .vae import VAE, check_vae, load_vae

Source = str | os.PathLike[str] | SiT
"""A checkpoint file, the name of a bundled model, or a network."""


def load(
    predictor: Source,
    refiner: Source | None = None,
    vae: str | os.PathLike[str] | VAE | None = None,
    *,
    heads: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    backend: Literal["auto", "reference", "triton", "cuda"] = "auto",
    convention: Literal["auto", "sit", "repa"] = "auto",
    quantize: Literal["fp8"] | None = None,
    null_class: int | Literal["auto"] | None = "auto",
    assume_velocity: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> FlowModel:
    """A flow model from checkpoints.

    predictor, refiner: a .pt, .pth or .safetensors file with SiT's keys (see checkpoint.load_sit),
        a bundled name ("emoji", or "digits", which brings its refiner), or a SiT, which is moved
        and cast in place. The refiner must read and return latents of the predictor's shape.
    vae: a folder or hub name of a diffusers AutoencoderKL (needs the extra "diffusers"), "pixels"
        (grey), "rgb", or an object with decode and encode. None: the one that the predictor's file
        names, else no decoding.
    heads: number of attention heads, for widths that were not published.
    device, dtype: None: cuda and bfloat16 if there is a GPU, else cpu and float32. dtype "auto":
        bfloat16 also on CPUs that have instructions for it, where it is faster and less exact.
    backend: which kernels run: "triton", "cuda" (those of csrc), "reference" (plain torch), or
        "auto": the environment variable FLOWTURBO_BACKEND, else the first that can run on a GPU,
        and plain torch on the CPU.
    convention: "repa" for checkpoints with reversed time; "auto": as the file says.
    quantize: "fp8" runs the predictor's matrix products in e4m3, with one scale per row or, for the
        outputs of GELU and attention, one per layer, which a few calls on fixed noise find here.
        That is faster on sm_89 and later, and changes the velocity by some percent, as `flowturbo
        bench --quantize fp8` measures. A SiT is changed in place.
    null_class: the row of the label table that guidance takes for no label; None: there is none,
        and no guidance; "auto": as the file says, else the last row, with a warning unless they are
        ImageNet's 1001.
    assume_velocity: take a network for a velocity on the straight path between noise and data even
        if its file says that it is none, such as SiT's with --path-type GVP or --prediction noise.
    image_size: None: that of the predictor's latents; others: see FlowModel.resized.
    Raises CheckpointError for a file that can't be used, ValueError or TypeError for arguments that
    don't fit together, BackendError if the device can't run the requested backend.
    """
    target, dtype = _device_and_dtype(device, dtype, backend, convention, quantize)
    if isinstance(predictor, str):
        predictor, refiner = files_of(predictor, refiner)
    reading = {"heads": heads, "null_class": null_class, "assume_velocity": assume_velocity}
    checkpoint = _checkpoint(predictor, "predictor", {**reading, "convention": convention})
    config = checkpoint.model.config
    notes, refiner_model = checkpoint.notes, None
    if refiner is not None:
        refining = _checked_refiner(refiner, checkpoint.model, reading)
        notes = notes.with_refiner(refining.notes)
        refiner_model = _placed("refiner", refining.model, target, dtype)
    sit = _placed("predictor", checkpoint.model, target, dtype)
    network: nn.Module = ReversedTime(sit) if checkpoint.convention == "repa" else sit
    if quantize:
        sit.quantize_(network)
    autoencoder = vae if vae is not None else checkpoint.vae
    if isinstance(autoencoder, str | os.PathLike):
        autoencoder = load_vae(autoencoder, target, dtype)
    check_vae(autoencoder, config.channels)
    # SiT's public code guides 3 of 4 channels, as the published scores do. All others guide all.
    guides_three = config.channels == 4 and checkpoint.convention == "sit"
    model = FlowModel(
        predictor=cast(Network, network),
        refiner=None if refiner_model is None else cast(Network, refiner_model),
        latent_shape=(config.channels, config.side, config.side),
        num_classes=config.num_classes,
        null_class=None if null_class is None else config.null_class,
        guidance_channels=3 if guides_three else config.channels,
        device=target,
        dtype=dtype,
        vae=autoencoder,
        backend=backend,
        macs=(config.macs(), 0 if refiner_model is None else refiner_model.config.macs()),
        class_names=checkpoint.class_names,
        sides=(config.side, *config.sides),
        plans=checked_plans(notes.plans),
        guidance=notes.guidance,
        license=notes.license,
    )
    return model if image_size is None else model.resized(image_size)


def _device_and_dtype(
    device: str | torch.device | None,
    dtype: torch.dtype | Literal["auto"] | None,
    backend: str,
    convention: str,
    quantize: str | None,
) -> tuple[torch.device, torch.dtype]:
    """Check the options of `load` -> the device and dtype of the model."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if convention not in ("auto", *CONVENTIONS):
        raise ValueError(f"convention must be 'auto', 'sit' or 'repa', got {convention!r}")
    if quantize not in (None, "fp8"):
        raise ValueError(f"quantize must be 'fp8' or None, got {quantize!r}")
    target = choose_device(device)
    if quantize and target.type == "cuda" and torch.cuda.get_device_capability(target) < (8, 9):
        raise ValueError("quantize='fp8' needs a GPU of sm_89 or later")
    if backend in ("triton", "cuda") and (reason := unavailable(backend, target)):
        raise BackendError(f"backend {backend!r} was asked for, but: {reason}")
    chosen = choose_dtype(dtype, target)
    if chosen == torch.bfloat16 and target.type == "cpu":
        warn_if_slow()
    return target, chosen


def _checkpoint(
    source: Source,
    role: Literal["predictor", "refiner"],
    reading: dict[str, Any],
) -> Checkpoint:
    """The checkpoint of a file, a bundled name or a network; checked for its role.

    reading: the options of load_sit, of which a network takes convention and null_class.
    """
    null_class = reading["null_class"]
    check_null_class(null_class)
    if isinstance(source, SiT):
        if source.config.reads_velocity != (role == "refiner"):
            raise ValueError(f"{role} must be a SiT with config.reads_velocity={role == 'refiner'}")
        if null_class not in ("auto", None, source.config.null_class):
            raise ValueError(
                f"null_class must be {source.config.null_class}, that of the SiT, or None, got "
                f"{null_class}"
            )
        check_finite(role, source.state_dict())
        return Checkpoint(source, "repa" if reading.get("convention") == "repa" else "sit")
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
        if (its_refiner := MODELS[source].refiner) is None:
            raise CheckpointError(f"{role} {source!r} is a bundled model that has no refiner")
        source = its_refiner
    return load_sit(source, role, **reading)


def _checked_refiner(source: Source, predictor: SiT, reading: dict[str, Any]) -> Checkpoint:
    """The refiner of a file, a bundled name or a network, if it fits the predictor."""
    checkpoint = _checkpoint(source, "refiner", {**reading, "like": predictor.config})
    if checkpoint.convention == "repa":
        raise CheckpointError(
            f"refiner {str(source)!r} is of convention 'repa', whose time runs backwards: a "
            "refiner must have been trained for time that runs from noise to data"
        )
    _check_pair(predictor, checkpoint.model)
    return checkpoint


def _placed(role: str, sit: SiT, device: torch.device, dtype: torch.dtype) -> SiT:
    """The network on the device, its weights laid out as they are read there.

    Raises CheckpointError for weights that are not finite in dtype.
    """
    weights = sit.state_dict()
    check_finite(role, {k: v for k, v in weights.items() if v.dtype != dtype}, dtype)
    sit = sit.to(device, dtype)
    return sit.stack_() if device.type == "cuda" else _aligned(sit)


def _aligned(sit: SiT) -> SiT:
    """The network, with weights on the CPU moved to multiples of 64 bytes, where torch puts them.

    safetensors leaves weights where they are in the file. Products of unaligned weights round
    differently (5e-7 was measured), so the same weights from two files would give two images.
    """
    for tensor in [*sit.parameters(), *sit.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return sit


def _check_pair(predictor: SiT, refiner: SiT) -> None:
    """Raise ValueError unless predictor and refiner have the same latents and classes."""
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
    if p.null_row != r.null_row:
        with_it, without = ("predictor", "refiner") if p.null_row else ("refiner", "predictor")
        raise ValueError(
            f"refiner does not fit the predictor: the {with_it} has a null class for guidance, the "
            f"{without} has none; null_class=None (--null-class none) loads both without guidance"
        )
