"""SiT checkpoints: read published files, and read and write our own.

Published: SiT, FlowTurbo and REPA, as .pt or .safetensors. Ours: safetensors with a description.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..storage.files import CheckpointError, load_tensors, load_torch_file, save_tensors
from .fp8 import Fp8Linear
from .sit import SiT, SiTConfig, config_from_state

Convention = Literal["sit", "repa"]
Role = Literal["predictor", "refiner"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
FORMAT = 1

# Prefixes of keys that are used in training only, by convention.
_DROPPED = {"sit": (), "repa": ("projectors.",)}


@dataclass(frozen=True)
class Checkpoint:
    """A SiT with its weights, and what its file says of them.

    vae: the name of the autoencoder that decodes its latents, if known.
    provenance: where the weights come from, if known.
    """

    model: SiT
    convention: Convention
    vae: str | None = None
    provenance: Mapping[str, Any] | None = None


def load_sit(
    path: str | os.PathLike[str],
    role: Role,
    *,
    heads: int | None = None,
    convention: Literal["auto", "sit", "repa"] = "auto",
) -> Checkpoint:
    """Read a SiT from a .pt, .pth or .safetensors file, on the CPU, in the file's dtype.

    Sizes are inferred from the tensors. The weights may be at the top level, or under "ema"
    (preferred) or "model", as the trainers of SiT, FlowTurbo and REPA write them. Only plain
    tensors and argparse.Namespace are unpickled.
    convention: "auto": as our own files say; "repa" for files with REPA's projectors; else "sit".
    Raises CheckpointError, naming the file and what is wrong with it.
    """
    if convention not in ("auto", *CONVENTIONS):
        raise ValueError(f"convention must be 'auto', 'sit' or 'repa', got {convention!r}")
    state, description = read_state(path)
    if description is not None:
        _check_description(path, description, role)
    detected: Convention = description["convention"] if description else _guess_convention(state)
    if convention not in ("auto", detected) and (description or detected == "repa"):
        raise CheckpointError(
            f"{path}: convention {convention!r} was asked for, but the file is of {detected!r}"
        )
    used = detected if convention == "auto" else convention
    state = {k: v for k, v in state.items() if not k.startswith(_DROPPED[used])}
    try:
        config = _config(state, description, role, heads)
        model = build(config, state)
    except KeyError as error:
        raise CheckpointError(f"{path} is no SiT checkpoint: it has no {error.args[0]!r}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if (
        not description
        and role == "predictor"
        and config.depth == 1
        and not config.learned_sigma
        and config.channels == 8
    ):
        raise CheckpointError(
            f"{path} is a refiner (one block, x and v as input): give it as refiner="
        )
    description = description or {}
    return Checkpoint(model, used, description.get("vae"), description.get("provenance"))


def save_sit(
    path: str | os.PathLike[str],
    model: SiT,
    *,
    convention: Convention = "sit",
    vae: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a SiT as safetensors, atomically, with its description and a digest of the file.

    provenance: where the weights come from, in values that JSON can hold.
    Raises ValueError for a quantised model: files hold the weights before quantisation.
    """
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise ValueError(
            "model must not be quantised to be saved: save it before quantize_(), and load it "
            "with quantize='fp8'"
        )
    description = {
        "format": FORMAT,
        "role": "refiner" if model.config.reads_velocity else "predictor",
        "config": asdict(model.config),
        "convention": convention,
        "vae": vae,
        "provenance": dict(provenance or {}),
    }
    save_tensors(path, model.state_dict(), description)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    role: Role = "predictor",
    heads: int | None = None,
    convention: Literal["auto", "sit", "repa"] = "auto",
    vae: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a published checkpoint as our safetensors file, checked and with a digest.

    Only the weights that sampling needs are written. dtype: None: that of the source. Raises
    CheckpointError for a source that can't be used, ValueError for a target with another suffix.
    """
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"target must end in .safetensors, got {str(target)!r}")
    checkpoint = load_sit(source, role, heads=heads, convention=convention)
    save_sit(
        target,
        checkpoint.model.to(dtype=dtype),
        convention=checkpoint.convention,
        vae=vae or checkpoint.vae,
        provenance={**(checkpoint.provenance or {}), "source": Path(source).name},
    )


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights of a file, unwrapped from "ema" or "model", and its description.

    The description is None unless the file is one of ours. Raises CheckpointError.
    """
    suffix = Path(path).suffix.lower()
    state: Any
    description: dict[str, Any] | None = None
    if suffix == ".safetensors":
        state, description = load_tensors(path)
    elif suffix in (".pt", ".pth"):
        state = load_torch_file(path)
    else:
        raise CheckpointError(f"{path} must end in .safetensors, .pt or .pth")
    for wrapper in ("ema", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{path} holds no weights: expected a mapping of names to tensors, got {_kind(state)}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: expected a tensor under {name!r}, got {_kind(value)}")
        if value.layout != torch.strided or value.is_meta:
            raise CheckpointError(
                f"{path}: expected a dense tensor with its numbers under {name!r}, got "
                f"{value.layout}, {value.device}"
            )
    return dict(state), description


def build(config: SiTConfig, state: Mapping[str, Tensor]) -> SiT:
    """A SiT with exactly these tensors, which are not copied.

    Raises ValueError naming missing, unexpected and misshapen tensors.
    """
    with torch.device("meta"):
        model = SiT(config)
    expected = model.state_dict()
    if scales := sorted(name for name in state if name.endswith(".weight_scale")):
        raise ValueError(
            "it is quantised, and only the weights before that can be loaded, with "
            f"quantize='fp8' ({_some(scales)})"
        )
    problems = []
    for what, names in (
        ("missing", expected.keys() - state.keys()),
        ("not part of a SiT of this size", state.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{what}: {_some(sorted(names))}")
    for name in sorted(expected.keys() & state.keys()):
        if state[name].shape != expected[name].shape:
            problems.append(
                f"{name} must have shape {tuple(expected[name].shape)}, got "
                f"{tuple(state[name].shape)}"
            )
        elif not state[name].is_floating_point():
            problems.append(f"{name} must be floating point, got {state[name].dtype}")
    if problems:
        raise ValueError("; ".join(problems[:8]))
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _config(
    state: Mapping[str, Tensor],
    description: Mapping[str, Any] | None,
    role: Role,
    heads: int | None,
) -> SiTConfig:
    """The sizes that the description has, or else those inferred from the tensors."""
    if description is None:
        return config_from_state(state, reads_velocity=role == "refiner", heads=heads)
    try:
        config = SiTConfig(**description["config"])
    except TypeError as error:
        raise ValueError(f"its config is none of a SiT: {error}") from None
    if heads not in (None, config.heads):
        raise ValueError(f"heads={heads} was asked for, but the file says {config.heads}")
    return config


def _check_description(
    path: str | os.PathLike[str], description: Mapping[str, Any], role: Role
) -> None:
    """Raise CheckpointError unless the description fits role and format."""
    if description.get("format") != FORMAT or "config" not in description:
        raise CheckpointError(
            f"{path} is no model file of format {FORMAT} (it says "
            f"{description.get('kind', description.get('format'))!r})"
        )
    if description.get("role") != role:
        raise CheckpointError(f"{path} is a {description.get('role')}, but was given as {role}=")
    if description.get("convention") not in CONVENTIONS:
        raise CheckpointError(
            f"{path} is of convention {description.get('convention')!r}; known are "
            f"{', '.join(CONVENTIONS)}"
        )


def _guess_convention(state: Mapping[str, Tensor]) -> Convention:
    return "repa" if any(k.startswith("projectors.") for k in state) else "sit"


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" + (" with nothing in it" if value in ({}, []) else "")


def _some(names: list[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
