"""SiT checkpoints: read published files, and read and write our own.

Published: SiT, FlowTurbo and REPA, as .pt or .safetensors. Ours: safetensors with a description.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import listed
from ..storage.files import (
    CheckpointError,
    header_texts,
    load_tensors,
    load_torch_file,
    save_tensors,
)
from .finite_weights import check_finite
from .fp8 import Fp8Linear
from .label_table import TABLE, NullClass, arranged, check_null_class
from .notes import NOTES, Notes
from .sit import SiT, SiTConfig, config_from_state
from .training_metadata import Said, said_by
from .vae import check_named_vae
from .wrapped_weights import kind, unwrapped

Convention = Literal["sit", "repa"]
Role = Literal["predictor", "refiner"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
FORMAT = 1
_LARGEST = 2**24
"""The largest size that one of our files may have."""

_UNRELATED = ("provenance", *NOTES)
"""What a description holds that is no argument of a trainer."""

# Prefixes of keys that are used in training only, by convention.
_DROPPED = {"sit": (), "repa": ("projectors.",)}


@dataclass(frozen=True)
class Checkpoint:
    """A SiT with its weights, and what its file says of them.

    vae: the name of the autoencoder that decodes its latents, if known.
    provenance: where the weights come from, if known.
    assumed: what the file says against a velocity on the straight path, if it was assumed to be
        one.
    notes: what the file says to those who use the model.
    """

    model: SiT
    convention: Convention
    vae: str | None = None
    provenance: Mapping[str, Any] | None = None
    assumed: str | None = None
    notes: Notes = field(default_factory=Notes)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of all classes, by number, if the file names them."""
        names = self.notes.class_names
        return None if names is None else tuple(names)


def load_sit(
    path: str | os.PathLike[str],
    role: Role,
    *,
    heads: int | None = None,
    convention: Literal["auto", "sit", "repa"] = "auto",
    null_class: NullClass = "auto",
    assume_velocity: bool = False,
    like: SiTConfig | None = None,
) -> Checkpoint:
    """Read a SiT from a .pt, .pth or .safetensors file, on the CPU, in the file's dtype.

    Sizes are inferred from the tensors. The weights may be at the top level or in mappings, as the
    trainers of SiT, FlowTurbo, REPA and others write them, averaged ones ("ema") preferred, with
    the prefixes of DDP, torch.compile and Lightning (see wrapped_weights). Only plain tensors and
    argparse.Namespace are unpickled.
    convention: "auto": as the file says; "repa" for files with REPA's projectors or the arguments
        of its trainer; else "sit".
    null_class: the row of the label table that is the null class; None: none is; "auto": as the
        file says, else the last one, with a warning unless they are ImageNet's 1001.
    assume_velocity: take the network for a velocity on the straight path between noise and data
        even if the file says that it is none.
    like: for a refiner, the predictor's sizes.
    Raises CheckpointError, naming the file and what is wrong with it.
    """
    if convention not in ("auto", *CONVENTIONS):
        raise ValueError(f"convention must be 'auto', 'sit' or 'repa', got {convention!r}")
    check_null_class(null_class)
    state, description, said = read_state(path)
    if description is not None:
        _check_description(path, description, role)
    if said.other and not assume_velocity:
        raise CheckpointError(
            f"{path} is no velocity model on the straight path between noise and data, for which "
            f"plans are made: {said.other}. If it is one all the same, give assume_velocity=True, "
            "or --assume-velocity, as `flowturbo convert` takes it, too"
        )
    used = _convention(path, state, description, said, convention)
    state = {k: v for k, v in state.items() if not k.startswith(_DROPPED[used])}
    try:
        weights, null_row = arranged(path, state, said, null_class, like)
        if description is None:
            config = config_from_state(
                weights, reads_velocity=role == "refiner", heads=heads, null_row=null_row
            )
        else:
            config = _described_sizes(description, state, heads)
            if len(state.get(TABLE, ())) == config.label_rows:
                classes = len(weights[TABLE]) - null_row
                config = replace(config, num_classes=classes, null_row=null_row)
        model = build(config, weights)
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
    check_finite(str(path), model.state_dict())
    description = description or {}
    return Checkpoint(
        model,
        used,
        description.get("vae"),
        description.get("provenance"),
        said.other,
        Notes.read(path, description, config.num_classes),
    )


def save_sit(
    path: str | os.PathLike[str],
    model: SiT,
    *,
    convention: Convention = "sit",
    vae: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    plans: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    license: str | None = None,
) -> None:
    """Write a SiT as safetensors, atomically, with its description and a digest of the file.

    provenance: where the weights come from, in values that JSON can hold.
    class_names: of all classes, by number; distinct, and none a number.
    plans: name -> what a plan's file holds, as JSON. That called "default" is the one that commands
        take if none is asked for.
    guidance: the scale that commands take if none is asked for.
    license: under which the weights may be used, a text of one line.
    Raises ValueError for a quantised model: files hold the weights before quantisation; TypeError
    or ValueError for names, plans and a scale that don't fit.
    """
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise ValueError(
            "model must not be quantised to be saved: save it before quantize_(), and load it "
            "with quantize='fp8'"
        )
    description: dict[str, Any] = {
        "format": FORMAT,
        "role": "refiner" if model.config.reads_velocity else "predictor",
        "config": _sizes(model.config),
        "convention": convention,
        "vae": vae,
        "provenance": dict(provenance or {}),
    }
    # Files without notes are what they were before there were any.
    notes = Notes(class_names, plans or {}, guidance, license)
    description |= notes.checked(model.config.num_classes, model.config.null_row)
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
    null_class: NullClass = "auto",
    assume_velocity: bool = False,
    notes: Notes | None = None,
) -> None:
    """Write a published checkpoint as our safetensors file, checked and with a digest.

    Only the weights that sampling needs are written. dtype: None: that of the source.
    null_class, assume_velocity: as for load_sit; the target needs them no more.
    notes: in place of those of the source, or, plans, beside them.
    Raises CheckpointError for a source that can't be used and for weights that overflow in dtype,
    ValueError for a target with another suffix and for a vae or notes that do not fit.
    """
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"target must end in .safetensors, got {str(target)!r}")
    checkpoint = load_sit(
        source,
        role,
        heads=heads,
        convention=convention,
        null_class=null_class,
        assume_velocity=assume_velocity,
    )
    check_finite(str(source), checkpoint.model.state_dict(), dtype)
    model = checkpoint.model.to(dtype=dtype)
    if vae is not None:
        check_named_vae(vae, model.config.channels)
    noted = checkpoint.notes.updated(notes or Notes())
    origin = {"source": Path(source).name}
    if checkpoint.assumed:
        origin["assumed"] = f"a velocity on the straight path, although {checkpoint.assumed}"
    save_sit(
        target,
        model,
        convention=checkpoint.convention,
        vae=vae or checkpoint.vae,
        provenance={**(checkpoint.provenance or {}), **origin},
        **vars(noted),
    )


def read_state(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Any] | None, Said]:
    """The weights of a file by a SiT's names, its description, and what it says of its training.

    The description is None unless the file is one of ours. Raises CheckpointError.
    """
    suffix = Path(path).suffix.lower()
    content: Any
    description: dict[str, Any] | None = None
    if suffix == ".safetensors":
        content, description = load_tensors(path)
        beside: Any = header_texts(path) if description is None else description
    elif suffix in (".pt", ".pth"):
        beside = content = load_torch_file(path)
    else:
        raise CheckpointError(
            f"{path} must end in .safetensors, .pt or .pth: rename a file of torch.save that has "
            "another suffix, such as .ckpt or .bin"
        )
    try:
        state = unwrapped(content)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: expected a tensor under {name!r}, got {kind(value)}")
        if value.layout != torch.strided or value.is_meta:
            raise CheckpointError(
                f"{path}: expected a dense tensor with its numbers under {name!r}, got "
                f"{value.layout}, {value.device}"
            )
    if description is None:
        return state, None, said_by(beside, Path(path).name)
    # Where the weights come from and what their classes are called says nothing of how they were
    # trained.
    origin = description.get("provenance")
    trained = origin.get("settings") if isinstance(origin, Mapping) else None
    others = {name: value for name, value in description.items() if name not in _UNRELATED}
    return state, description, said_by([others, trained])


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
            f"quantize='fp8' ({listed(scales, 4)})"
        )
    problems = []
    for what, names in (
        ("missing", expected.keys() - state.keys()),
        ("not part of a SiT of this size", state.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{what}: {listed(sorted(names), 4)}")
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


def _described_sizes(
    description: Mapping[str, Any], state: Mapping[str, Tensor], heads: int | None
) -> SiTConfig:
    """The sizes that one of our files has. ValueError for others, and for other heads."""
    try:
        config = SiTConfig(**description["config"])
    except TypeError as error:
        raise ValueError(f"its config is none of a SiT: {error}") from None
    if heads not in (None, config.heads):
        raise ValueError(f"heads={heads} was asked for, but the file says {config.heads}")
    # Building a network of lying sizes would not end.
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    sizes = asdict(config)
    numbers = map(int, (*sizes.pop("sides"), *sizes.values()))
    if config.depth != blocks or max(numbers) > _LARGEST:
        raise ValueError(f"it has {blocks} blocks, and its description is {config}")
    return config


def _convention(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    description: Mapping[str, Any] | None,
    said: Said,
    asked: Literal["auto", "sit", "repa"],
) -> Convention:
    """The convention that was asked for, unless the file is certainly of the other."""
    projectors = any(name.startswith("projectors.") for name in state)
    detected: Convention = (
        description["convention"] if description else "repa" if projectors or said.repa else "sit"
    )
    if asked not in ("auto", detected) and (description or projectors):
        raise CheckpointError(
            f"{path}: convention {asked!r} was asked for, but the file is of {detected!r}"
        )
    return detected if asked == "auto" else asked


def _sizes(config: SiTConfig) -> dict[str, Any]:
    """The sizes as files hold them: a null row, which nearly all have, is named if it is not there,
    and further sides if there are any.

    So the files of models without are what they were before there were others.
    """
    sizes = asdict(config)
    if config.null_row:
        del sizes["null_row"]
    if not config.sides:
        del sizes["sides"]
    return sizes


def _check_description(
    path: str | os.PathLike[str], description: Mapping[str, Any], role: Role
) -> None:
    """Raise CheckpointError unless the description fits role and format."""
    if description.get("format") != FORMAT or "config" not in description:
        raise CheckpointError(
            f"{path} is no model file of format {FORMAT} (it says "
            f"{description.get('kind', description.get('format'))!r:.80})"
        )
    if description.get("role") != role:
        raise CheckpointError(
            f"{path} is a {description.get('role')!s:.80}, but was given as {role}="
        )
    vae, origin = description.get("vae"), description.get("provenance")
    if not isinstance(vae, str | None) or not isinstance(origin, dict | None):
        raise CheckpointError(f"{path} must name its vae as text and its provenance as a mapping")
    if description.get("convention") not in CONVENTIONS:
        raise CheckpointError(
            f"{path} is of convention {description.get('convention')!r:.80}; known are "
            f"{', '.join(CONVENTIONS)}"
        )
