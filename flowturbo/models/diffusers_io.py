"""Networks as diffusers' save_pretrained writes them: folders or hub names.

Only safetensors are read, and every weight must be in the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..runtime.modes import own_modes
from ..storage.files import CheckpointError, save_tensors, write_text
from .finite_weights import check_finite

WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a path rather than a name on the hub.

    A mistyped path must not become a request to the hub.
    """
    path = Path(name)
    if (
        not isinstance(name, str)
        or name.startswith((".", "/", "~"))
        or path.is_absolute()
        or path.exists()
    ):
        return True
    return path.parent.exists()


@own_modes()
def read_pretrained(
    role: str, kinds: Mapping[str, Any], name: str | os.PathLike[str], source: str, **options: Any
) -> Any:
    """A network in float32, all of whose weights come from its file.

    role: what error messages call it.
    kinds: classes by name, of which the configuration names one; the first if it names none.
    name: what the user gave, for error messages.
    source, options: what from_pretrained takes.
    Raises CheckpointError.
    """
    first = next(iter(kinds))
    try:
        with warnings.catch_warnings():
            # diffusers calls the hub's library in a deprecated way.
            warnings.simplefilter("ignore")
            kind = kinds[first].load_config(source, **options).get("_class_name", first)
        if kind not in kinds:
            raise ValueError(f"it is a model of the kind {kind}, not one of {', '.join(kinds)}")
        network, info = kinds[kind].from_pretrained(
            source,
            use_safetensors=True,
            torch_dtype=torch.float32,
            # Classes that keep some modules in float32 can't be read otherwise.
            low_cpu_mem_usage=bool(getattr(kinds[kind], "_keep_in_fp32_modules", None)),
            output_loading_info=True,
            **options,
        )
    except MemoryError:
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError, KeyError and others
        raise CheckpointError(f"{role} {str(name)!r} can't be read: {first_line(error)}") from error
    # diffusers would leave missing weights random, and only log it.
    for verb, keys in (
        ("lacks", info["missing_keys"]),
        ("has unexpected", info["unexpected_keys"]),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:4])
            raise CheckpointError(
                f"{role} {str(name)!r} is no {type(network).__name__} of its own configuration: "
                f"it {verb} {some} ({len(keys)} keys)"
            )
    check_finite(f"{role} {str(name)!r}", network.state_dict())
    return network


def write_pretrained(folder: Path, network: Any, provenance: Mapping[str, Any]) -> Path:
    """Write a network as read_pretrained and from_pretrained read it -> path of the weights.

    config.json and the weights are each written atomically.
    provenance: where the weights come from, in values that JSON can hold.
    """
    weights = folder / WEIGHTS
    write_text(folder / "config.json", network.to_json_string())
    save_tensors(weights, network.state_dict(), provenance)
    return weights


_HUB_TIMEOUT = 10.0


def ask_hub(role: str, name: str, repository: str) -> None:
    """Ask the hub once, with a time limit, whether a repository can be read.

    diffusers itself would try for half a minute before it reported a missing network. Raises
    ValueError if there is no network, or no such repository that may be read.
    """
    import huggingface_hub

    try:
        huggingface_hub.model_info(repository, timeout=_HUB_TIMEOUT)
    except Exception as error:  # no network, no such name, or no access
        raise ValueError(
            f"{role} {name!r} is no folder here, was not downloaded before, and can't be had from "
            f"the hub: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0] or type(error).__name__
