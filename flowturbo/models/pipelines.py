"""Text-to-image models from diffusers' pipelines: which parts of them are loaded, and what the
pipeline says of the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..checks import positive
from ..runtime.device import choose_device
from ..storage.files import CheckpointError
from .diffusers_io import ask_hub, first_line, is_path
from .text_to_image import PromptModel, PromptNetwork, check_refiner, guidance_style
from .vae import VAE, DiffusersVAE, load_vae
from .vae_fusion import fuse


def from_pipeline(
    pipe: Any,
    refiner: nn.Module | str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | VAE | None = None,
    *,
    convention: Literal["auto", "2-rf"] = "auto",
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PromptModel:
    """A text-to-image flow model from a diffusers pipeline: SD3, FLUX, or a Stable Diffusion 1.5
    pipeline that holds 2-RF's UNet.

    pipe: a pipeline, or its folder or hub name. refiner: as `refiner_for` makes and `flowturbo
        distill` trains it: a module, or the folder it was saved to.
    vae: as for `load`, in the place of the pipeline's own.
    convention: "2-rf" must be said for a UNet: those of Stable Diffusion itself look just the same,
        and are no flow models.
    image_size: height and width in pixels, or both in one; None: the network's own.
    device, dtype: None: where the pipeline is, and in what; for a folder or hub name as for `load`.
        The whole pipeline is moved, and cast but for parts that are quantised.
    Raises ValueError or TypeError for what is no flow model, or does not fit.
    """
    named = isinstance(pipe, str | os.PathLike)
    if named:
        pipe = load_pipeline(
            pipe, ("network", "text") if vae is not None else ("network", "text", "vae")
        )
    module: Any = network_of(pipe, convention)
    network = PromptNetwork(module)
    place = torch.device(module.device) if device is None and not named else choose_device(device)
    if dtype is None:
        loaded = torch.bfloat16 if place.type == "cuda" else torch.float32
        dtype = loaded if named and not _quantised(module) else module.dtype
    refiner_network = None if refiner is None else PromptNetwork(check_refiner(refiner, module))
    if vae is None and getattr(pipe, "vae", None) is not None:
        codec: VAE | None = DiffusersVAE(pipe.vae)
    else:
        codec = load_vae(vae, place, dtype) if isinstance(vae, str | os.PathLike) else vae
    factor = codec.factor if codec else 8
    height, width = _size(network, factor, image_size)
    parts = [
        module,
        *(
            part
            for part in getattr(pipe, "components", {}).values()
            if isinstance(part, nn.Module) and part is not module
        ),
    ]
    if _quantised(module) and dtype != module.dtype:
        raise ValueError(
            f"dtype must be left out for a quantised {type(module).__name__} of {module.dtype}, "
            f"got {dtype}"
        )
    if named or device is not None or dtype != module.dtype:
        for part in parts:
            move_part(part, place, dtype)
    if refiner_network is not None:
        move_part(refiner_network, place, dtype)
        parts.append(refiner_network)
    for part in parts:
        part.eval().requires_grad_(False)
    if named and vae is None and codec is not None:
        fuse(pipe.vae)
    return PromptModel(
        predictor=network,
        refiner=refiner_network,
        latent_shape=(network.channels, height // factor, width // factor),
        num_classes=0,
        null_class=None,
        guidance_channels=network.channels,
        device=place,
        dtype=dtype,
        vae=codec,
        guidance_style=guidance_style(module),
        shift=_shift(
            getattr(pipe, "scheduler", None), height * width // (factor * network.multiple) ** 2
        ),
        pipe=pipe if getattr(pipe, "text_encoder", None) is not None else None,
    )


def move_part(part: nn.Module, place: torch.device, dtype: torch.dtype) -> None:
    """By nn.Module's own way, which also casts what diffusers' refuses to; what is quantised is
    moved and stays what it is.
    """
    if _quantised(part):
        nn.Module.to(part, place)
    else:
        nn.Module.to(part, place, dtype)


def _quantised(part: nn.Module) -> bool:
    """Whether its weights are no plain numbers: by diffusers' and transformers' quantisers, or kept
    in 8 bits and widened layer by layer (enable_layerwise_casting)."""
    if any(getattr(module, "is_quantized", False) for module in part.modules()):
        return True
    return any(
        t.is_floating_point() and t.dtype.itemsize == 1
        for t in (*part.parameters(), *part.buffers())
    )


def _size(
    network: PromptNetwork, factor: int, image_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width in pixels that the network can make."""
    own = network.side * factor
    height, width = (
        (image_size, image_size) if isinstance(image_size, int) else image_size or (own, own)
    )
    step, most = network.multiple * factor, network.longest * factor
    if any(positive("image_size", side) % step or side > most for side in (height, width)):
        raise ValueError(
            f"image_size must be multiples of {step}, at most {most}, for this model, got "
            f"{height} x {width}"
        )
    return height, width


def _shift(scheduler: Any, tokens: int) -> float:
    """The shift of the time grid that a pipeline's scheduler applies, for images of so many tokens
    (SD3: fixed; FLUX: by size).
    """
    config = getattr(scheduler, "config", {})
    if not str(config.get("_class_name", type(scheduler).__name__)).startswith("FlowMatch"):
        return 1.0
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    mu = low + (high - low) * (tokens - first) / (last - first)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def network_of(pipe: Any, convention: str) -> nn.Module:
    """The velocity network of a pipeline. TypeError and ValueError for what is no flow model, or
    may be none.
    """
    module = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if module is None:
        raise TypeError(
            f"pipe must be a pipeline with a transformer or a unet, got {type(pipe).__name__}"
        )
    if type(module).__name__ == "UNet2DConditionModel" and convention != "2-rf":
        raise ValueError(
            "convention='2-rf' must be given for a UNet: that of Stable Diffusion itself would "
            "give noise"
        )
    return module


Part = Literal["network", "text", "vae"]


def load_pipeline(
    name: str | os.PathLike[str], parts: Sequence[Part] = ("network", "text", "vae")
) -> Any:
    """A diffusers pipeline of which only these parts are loaded, in float32 on the CPU.

    ValueError where it can't be had, of the kind CheckpointError where its files can't be used.
    name: a folder as save_pretrained writes it, or a hub name.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"model {str(name)!r} needs diffusers: pip install 'flowturbo[diffusers]' ({error})"
        ) from None
    where = str(Path(name).expanduser()) if is_path(name) else str(name)
    if is_path(name) and not (Path(where) / "model_index.json").is_file():
        raise CheckpointError(
            f"model {str(name)!r} is no folder of a diffusers pipeline: it has no model_index.json"
        )
    if not is_path(name):
        try:
            diffusers.DiffusionPipeline.load_config(where, local_files_only=True)
        except OSError:  # not downloaded before
            ask_hub("model", str(name), where)
    try:
        config = diffusers.DiffusionPipeline.load_config(where)
        # A pipeline saved without one of its text encoders wants to be told so again.
        left_out = {
            key: None
            for key, kind in config.items()
            if _part(key) not in (None, *parts) or kind == [None, None]
        }
        for key in left_out.keys() & {"transformer"}:  # encoding asks for its configuration
            kind: Any = getattr(diffusers, config[key][1])
            with torch.device("meta"):
                left_out[key] = kind.from_config(kind.load_config(where, subfolder=key))
        # 2-RF was published as a pipeline of a class of its own, with the parts of this one.
        base = (
            diffusers.StableDiffusionPipeline if "unet" in config else diffusers.DiffusionPipeline
        )
        return base.from_pretrained(where, use_safetensors=True, **left_out)
    except MemoryError:
        raise
    except Exception as error:  # whatever its readers stumble on
        hint = ""
        if "safetensors" in str(error):
            hint = (
                "; pickled weights are not read: if you trust them, load them once with "
                "use_safetensors=False and save_pretrained"
            )
        raise CheckpointError(
            f"model {str(name)!r} can't be loaded: {first_line(error)}{hint}"
        ) from error


def _part(component: str) -> Part | Literal["unused"] | None:
    """Which part a component of a pipeline belongs to; None: it is small, and always loaded."""
    if component in ("transformer", "unet"):
        return "network"
    if component.startswith(("text_encoder", "tokenizer")):
        return "text"
    if component in ("safety_checker", "feature_extractor", "image_encoder"):
        return "unused"
    return "vae" if component == "vae" else None


def is_pipeline(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name means a pipeline: a folder, or a hub name such as "org/name"."""
    if Path(name).expanduser().is_dir():
        return True
    checkpoint = Path(name).suffix in (".pt", ".pth", ".safetensors")
    return not checkpoint and not is_path(name) and str(name).count("/") == 1
