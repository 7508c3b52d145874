"""Refiners for networks of diffusers."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..checks import positive
from ..storage.files import user_path
from .diffusers_io import is_path, read_pretrained
from .prompt_kind import Kind, original
from .prompt_kinds import check_text_alone, kind_of
from .prompt_network import config_of


def refiner_for(teacher: nn.Module, depth: int = 1) -> nn.Module:
    """A new refiner for a diffusers network, which reads x and v (paper section 3.2).

    depth: 1 or 2 blocks of the teacher's kind. For a UNet it is the number of layers per block, and
        the first width is halved in the first half of the levels and kept in the others, as in
        2-RF.
    Its last layer is zero, and so is its output. Of Wan 2.2's two networks give the first: one
    refiner serves both. Raises TypeError for another class of network, ValueError for another depth
    and for a network that reads more than latents and prompts.
    """
    if positive("depth", depth) > 2:
        raise ValueError(f"depth must be 1 or 2, got {depth}")
    kind = kind_of(teacher, "teacher")
    check_text_alone(teacher)
    teacher_config = config_of(teacher)
    config = {**teacher_config, **kind.refiner(teacher_config, depth)}
    config["in_channels"] = 2 * teacher_config["in_channels"]
    if "out_channels" in config:
        config["out_channels"] = teacher_config["out_channels"] or teacher_config["in_channels"]
    refiner: Any = type(original(teacher))(**config)
    last = kind.last_layer(refiner)
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    if last.bias is not None:
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return refiner


def check_refiner(refiner: nn.Module | str | os.PathLike[str], teacher: Any) -> nn.Module:
    """A refiner, or the network in its folder or hub name, if it fits the teacher.

    Raises TypeError or ValueError if it does not, CheckpointError if it can't be read.
    """
    check_text_alone(teacher)
    kind: Any = type(original(teacher))
    module: Any = refiner
    if isinstance(refiner, str | os.PathLike):
        source = str(user_path(refiner)) if is_path(refiner) else str(refiner)
        module = read_pretrained("refiner", {kind.__name__: kind}, refiner, source)
    if type(original(module)) is not kind:
        raise TypeError(
            f"refiner must be a {kind.__name__} as the predictor is, got "
            f"{type(original(module)).__name__}"
        )
    channels, refiner_channels = (
        original(network).config.in_channels for network in (teacher, module)
    )
    if refiner_channels != 2 * channels:
        raise ValueError(
            f"refiner must read {2 * channels} channels, x and v, got {refiner_channels}"
        )
    _check_sizes(original(module).config, original(teacher).config, kind_of(teacher, "teacher"))
    return module


# What a network reads and gives besides latents of its channels; depth and width may differ.
_SIZES = (
    *("joint_attention_dim", "pooled_projection_dim", "cross_attention_dim", "cap_feat_dim"),
    *("text_dim", "patch_size", "guidance_embeds"),
)


def _check_sizes(refiner: Any, teacher: Any, kind: Kind) -> None:
    """Raise ValueError unless two configurations have the same conditions and outputs."""
    compared = [(name, refiner.get(name), teacher.get(name)) for name in _SIZES]
    if "out_channels" in teacher:  # Z-Image's class gives as many channels as it reads
        compared.append(("number of output channels", kind.outputs(refiner), kind.outputs(teacher)))
    for name, ours, theirs in compared:
        # Tuples come back from a file as lists.
        if None not in (ours, theirs) and str(ours).strip("()[]") != str(theirs).strip("()[]"):
            raise ValueError(
                f"refiner does not fit the predictor: its {name} is {ours}, the predictor's "
                f"{theirs}"
            )
