"""Text-to-image models from diffusers pipelines.

Which parts of a pipeline are loaded, and what it says of the model.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..checks import positive
from ..runtime.cpu_dtype import choose_dtype
from ..runtime.device import choose_device
from ..storage.files import CheckpointError, user_path
from .diffusers_io import ask_hub, first_line, is_path
from .finite_weights import check_finite
from .normalised_vae import Flux2VAE, VideoVAE
from .prompt_kind import Kind, type_name
from .prompt_kinds import KINDS, check_text_alone
from .prompt_network import PromptNetwork, TwoExperts
from .refiners import check_refiner
from .text_to_image import PromptModel
from .vae import VAE, DiffusersVAE, check_vae, load_vae
from .vae_fusion import fuse


def from_pipeline(
    pipe: Any,
    refiner: nn.Module | str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | VAE | None = None,
    *,
    convention: Literal["auto", "2-rf"] = "auto",
    image_size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
) -> PromptModel:
    """A text-to-image or text-to-video flow model from a diffusers pipeline.

    pipe: a pipeline of SD3, FLUX.1, FLUX.2 (Klein too), Qwen-Image, Z-Image or Wan (2.1 and 2.2,
        text to video), or a Stable Diffusion 1.5 pipeline that holds 2-RF's UNet; or the folder or
        hub name of one. Its network must read latents and prompts alone, which those of FLUX Fill,
        Control and Kontext, of editing and of image to video do not.
    refiner: a network as `refiner_for` makes it and `flowturbo distill` trains it, or its folder.
    vae: as for `load`, instead of the pipeline's own.
    convention: "2-rf" is required for a UNet, since Stable Diffusion's own look the same and are no
        flow models.
    image_size: height and width in pixels, or one number for both; None: the network's default.
    frames: of a video; rounded down to what the VAE can encode, 1 more than a multiple of its
        factor in time. None: 81.
    device, dtype: None: those of the pipeline; for a folder or hub name as for `load`. The whole
        pipeline is moved and cast, but quantised parts are not cast.
    Raises ValueError or TypeError for what is no flow model or does not fit, CheckpointError for
    files that can't be read.
    """
    named = isinstance(pipe, str | os.PathLike)
    name = pipe
    if named:
        pipe = load_pipeline(
            pipe, ("network", "text") if vae is not None else ("network", "text", "vae")
        )
    network = network_with_prompts(pipe, convention)
    module: Any = network.module
    target = _target(module) if device is None and not named else choose_device(device)
    if dtype is None and (not named or _quantised(module)):
        dtype = module.dtype
    dtype = choose_dtype(dtype, target)
    refiner_network = None if refiner is None else PromptNetwork(check_refiner(refiner, module))
    if vae is None and getattr(pipe, "vae", None) is not None:
        codec: VAE | None = pipeline_vae(pipe)
    else:
        codec = load_vae(vae, target, dtype) if isinstance(vae, str | os.PathLike) else vae
    check_vae(codec, network.channels)
    shape = _latent_shape(network, codec, image_size, frames)
    if _quantised(module) and dtype != module.dtype:
        raise ValueError(
            f"dtype must be left out for a quantised {type_name(module)} of {module.dtype}, "
            f"got {dtype}"
        )
    parts = _modules(pipe, module)
    if named:
        for part in parts:
            weights = dict(part.named_parameters())
            check_finite(f"{type_name(part)} of {str(name)!r}", weights, dtype)
    if named or device is not None or dtype != module.dtype:
        for part in parts:
            move_part(part, target, dtype)
    if refiner_network is not None:
        move_part(refiner_network, target, dtype)
        parts.append(refiner_network)
    for part in parts:
        part.eval().requires_grad_(False)
    if named and isinstance(codec, DiffusersVAE):
        fuse(pipe.vae)
    scheduler = getattr(pipe, "scheduler", None)
    shift_of = functools.partial(_shift_of, network.kind, scheduler)
    model = PromptModel(
        predictor=network,
        refiner=refiner_network,
        latent_shape=shape,
        num_classes=0,
        null_class=None,
        guidance_channels=network.channels,
        device=target,
        dtype=dtype,
        vae=codec,
        guidance_style=network.kind.guidance(module, pipe),
        shift=shift_of(math.prod(shape[1:]) // network.multiple**2),
        pipe=pipe if getattr(pipe, "text_encoder", None) is not None else None,
    )
    if getattr(scheduler, "config", {}).get("use_dynamic_shifting"):
        model.shift_of = shift_of
    return model


def network_with_prompts(pipe: Any, convention: str = "auto") -> PromptNetwork:
    """The velocity network of a pipeline, or both of Wan 2.2's.

    Raises TypeError if there is none that is known, ValueError for a UNet without convention
    "2-rf", and for a network that reads more than latents and prompts.
    """
    module = network_of(pipe, convention)
    network = PromptNetwork(module)
    check_text_alone(module, pipe)
    boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    second = getattr(pipe, "transformer_2", None)
    if boundary is None or second is None:
        return network
    return TwoExperts(module, second, float(boundary))


def pipeline_vae(pipe: Any) -> VAE:
    """The pipeline's own autoencoder."""
    name = type_name(pipe.vae)
    if name in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        return VideoVAE(pipe.vae, video=name == "AutoencoderKLWan")
    return Flux2VAE(pipe.vae) if name == "AutoencoderKLFlux2" else DiffusersVAE(pipe.vae)


def _target(network: Any) -> torch.device:
    """Where a network is. ValueError if its weights are offloaded."""
    device = torch.device(network.device)
    if device.type == "meta":
        raise ValueError(
            f"pipe must hold its weights: those of its {type_name(network)} are offloaded; make "
            "the model before enable_sequential_cpu_offload, or give device="
        )
    return device


def _modules(pipe: Any, network: nn.Module) -> list[nn.Module]:
    """All modules of a pipeline, its velocity network first."""
    components = getattr(pipe, "components", {}).values()
    others = [part for part in components if isinstance(part, nn.Module) and part is not network]
    return [network, *others]


def move_part(part: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast a part of a pipeline, in place; quantised parts are only moved.

    Wan's networks keep some of their modules in float32, as they do when they are loaded.
    nn.Module.to itself: diffusers' own refuses some casts.
    """
    if _quantised(part):
        nn.Module.to(part, device)
        return
    kept = {
        id(tensor)
        for network in part.modules()
        if type(network).__name__ in KINDS and dtype.itemsize < 4
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if set(name.split(".")) & set(getattr(network, "_keep_in_fp32_modules", None) or ())
    }
    if not kept:
        nn.Module.to(part, device, dtype)
        return
    part._apply(
        lambda t: t.to(device, dtype if t.is_floating_point() and id(t) not in kept else None)
    )


def _quantised(part: nn.Module) -> bool:
    """Whether the weights are quantised.

    By the quantisers of diffusers and transformers, or kept in 8 bits and cast layer by layer
    (enable_layerwise_casting).
    """
    if any(getattr(module, "is_quantized", False) for module in part.modules()):
        return True
    return any(
        t.is_floating_point() and t.dtype.itemsize == 1
        for t in (*part.parameters(), *part.buffers())
    )


def _latent_shape(
    network: PromptNetwork,
    codec: VAE | None,
    image_size: int | tuple[int, int] | None,
    frames: int | None,
) -> tuple[int, ...]:
    """(C, H, W), or (C, T, H, W). ValueError for sizes that the network can't generate."""
    factor = codec.factor if codec else network.kind.factor
    height, width = (
        (image_size, image_size)
        if isinstance(image_size, int)
        else image_size or tuple(side * factor for side in network.sides)
    )
    step, longest = network.multiple * factor, network.longest * factor
    if any(positive("image_size", side) % step or side > longest for side in (height, width)):
        raise ValueError(
            f"image_size must be multiples of {step}, at most {longest}, for this model, got "
            f"{height} x {width}"
        )
    if network.kind.spatial == 2:
        if frames is not None:
            raise ValueError(f"frames must be left out for a model of images, got {frames}")
        return network.channels, height // factor, width // factor
    per_latent = getattr(codec, "frames_per_latent", 4)
    count = (positive("frames", 81 if frames is None else frames) - 1) // per_latent + 1
    return network.channels, count, height // factor, width // factor


def _shift_of(kind: Kind, scheduler: Any, tokens: int) -> float:
    """The shift of the time grid for images of so many tokens."""
    return kind.shift(scheduler, tokens) or _shift(scheduler, tokens)


def _shift(scheduler: Any, tokens: int) -> float:
    """The shift of the time grid that a pipeline's scheduler applies.

    tokens: of an image. SD3's shift is fixed, FLUX's depends on them.
    """
    config = getattr(scheduler, "config", {})
    if not str(config.get("_class_name", type(scheduler).__name__)).startswith("FlowMatch"):
        # UniPC and DPM++ on the noise levels of a flow, as in Wan's pipelines.
        return float(config.get("flow_shift") or 1.0) if config.get("use_flow_sigmas") else 1.0
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    mu = low + (high - low) * (tokens - first) / (last - first)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def network_of(pipe: Any, convention: str) -> nn.Module:
    """The velocity network of a pipeline.

    Raises TypeError if there is none, ValueError for a UNet without convention "2-rf".
    """
    module = getattr(pipe, "transformer", None)
    module = getattr(pipe, "unet", None) if module is None else module
    if module is None:
        raise TypeError(
            f"pipe must be a pipeline with a transformer or a unet, got {type(pipe).__name__}"
        )
    if type_name(module) == "UNet2DConditionModel" and convention != "2-rf":
        raise ValueError(
            "convention='2-rf' must be given for a UNet: that of Stable Diffusion itself would "
            "give noise"
        )
    return module


Part = Literal["network", "text", "vae"]


def load_pipeline(
    name: str | os.PathLike[str], parts: Sequence[Part] = ("network", "text", "vae")
) -> Any:
    """A diffusers pipeline with only these parts, in float32 on the CPU.

    name: a folder as save_pretrained writes it, or a hub name.
    Raises ValueError if it can't be found, and CheckpointError, a ValueError too, if its files
    can't be used.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"model {str(name)!r} needs diffusers: pip install 'flowturbo[diffusers]' ({error})"
        ) from None
    source = str(user_path(name)) if is_path(name) else str(name)
    if is_path(name) and not (Path(source) / "model_index.json").is_file():
        raise CheckpointError(
            f"model {str(name)!r} is no folder of a diffusers pipeline: it has no model_index.json"
        )
    if not is_path(name):
        try:
            diffusers.DiffusionPipeline.load_config(source, local_files_only=True)
        except OSError:  # not downloaded before
            ask_hub("model", str(name), source)
    try:
        config = diffusers.DiffusionPipeline.load_config(source)
        # from_pretrained needs None again for components that were left out when it was saved.
        left_out = {
            key: None
            for key, kind in config.items()
            if _part(key) not in (None, *parts) or kind == [None, None]
        }
        for key in left_out.keys() & {"transformer"}:  # encoding reads its configuration
            kind: Any = getattr(diffusers, config[key][1])
            with torch.device("meta"):
                left_out[key] = kind.from_config(kind.load_config(source, subfolder=key))
        # 2-RF was published with a pipeline class of its own, with the components of this one.
        base = (
            diffusers.StableDiffusionPipeline if "unet" in config else diffusers.DiffusionPipeline
        )
        return base.from_pretrained(source, use_safetensors=True, **left_out)
    except MemoryError:
        raise
    except Exception as error:  # its readers raise many types
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
    """The part that a component belongs to; None: it is small, and always loaded."""
    if component in ("transformer", "transformer_2", "unet"):
        return "network"
    if component.startswith(("text_encoder", "tokenizer")):
        return "text"
    if component in ("safety_checker", "feature_extractor", "image_encoder"):
        return "unused"
    return "vae" if component == "vae" else None


def is_pipeline(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of a pipeline: a folder, or a hub name such as "org/name"."""
    if user_path(name).is_dir():
        return True
    checkpoint = Path(name).suffix in (".pt", ".pth", ".safetensors")
    return not checkpoint and not is_path(name) and str(name).count("/") == 1
